"""The server's certificate and its private key."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from server.errors import UsageError

NO_PASSWORD = ""
"""For the key: with None, OpenSSL would ask on the terminal for the password of an encrypted one."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files: ``cert`` holds the server's certificate and those between it and a root, ``key`` its private key."""

    cert: Path
    key: Path

    def check(self) -> None:
        """Raises UsageError where the server could not use them."""
        self.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def load_into(self, context: ssl.SSLContext) -> None:
        """New connections of ``context`` get this certificate, open ones keep theirs. Raises UsageError."""
        for path in (self.cert, self.key):
            if not path.is_file():
                raise UsageError(f"tls: there is no file {path}")
        try:
            context.load_cert_chain(self.cert, self.key, password=NO_PASSWORD)
        except ssl.SSLError as error:
            why = "the key is not that of the certificate" if error.reason == "KEY_VALUES_MISMATCH" else "no such PEM"
            raise UsageError(f"tls: {self.cert} and {self.key} cannot be used: {why}") from None
        except OSError as error:
            raise UsageError(f"tls: {self.cert} and {self.key} cannot be read: {error.strerror}") from None
