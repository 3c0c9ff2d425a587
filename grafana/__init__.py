"""Dashboards, alert rules, and the checks that run both against a real Prometheus."""
