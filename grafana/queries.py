"""Queries of panels as Prometheus takes them: the dashboard's variables filled in."""

from __future__ import annotations

RATE_INTERVAL = "15s"
"""Grafana takes at least four scrape intervals; the checks scrape once a second."""


def filled(expression: str) -> str:
    """For all models and instances."""
    return (
        expression.replace("$__rate_interval", RATE_INTERVAL).replace('"$model"', '".*"').replace('"$instance"', '".*"')
    )


def of_gpu(expression: str) -> bool:
    """It needs what only a GPU's driver or data sheet tells."""
    return "slimserve_gpu_" in expression or "slimserve_peak_" in expression
