"""Load tests with locust: see docs/load-testing.md."""
