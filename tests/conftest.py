"""Before any test module is read: kernels that one defines at its import are those that all others find."""

from __future__ import annotations

from contextlib import suppress

with suppress(ModuleNotFoundError):
    import tests.triton_interpreter  # noqa: F401 -- Triton asks at its own first import whether to interpret
