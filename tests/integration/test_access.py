"""Who gets in, over real HTTP and HTTPS: TLS, the metrics port, the description's switch, pages of other origins."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.servers import free_port
from tests.integration.fake_server import PATIENCE, FakeServer, configuration, fake_server, wait_until

KEY = "the-key-of-all-requests"
ADMIN = "the-key-of-the-operator"
PAGE = "https://app.example.org"
BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True, "stream": True}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def write_certificate(folder: Path, password: bytes | None = None) -> None:
    """A certificate for 127.0.0.1 that nobody else has signed, and its key: ``cert.pem`` and ``key.pem``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "slimserve test")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, encryption))


class Locked:
    """A server with everything on: TLS, keys, a metrics port, one listed origin, no description."""

    def __init__(self, server: FakeServer, folder: Path, metrics_port: int) -> None:
        self.server = server
        self.folder = folder
        self.url = server.url.replace("http:", "https:")
        self.metrics_url = f"https://127.0.0.1:{metrics_port}/metrics"

    def request(self, method: str, url: str, key: str = "", **options: object) -> httpx.Response:
        """Trusts the certificate that is in the folder now. ``url`` may be a path."""
        headers = ({"authorization": f"Bearer {key}"} if key else {}) | dict(options.pop("headers", {}))  # type: ignore[call-overload]
        with httpx.Client(verify=ssl.create_default_context(cafile=str(self.folder / "cert.pem"))) as client:
            url = url if url.startswith("https:") else self.url + url
            return client.request(method, url, headers=headers, timeout=PATIENCE, **options)  # type: ignore[arg-type]

    def ready(self) -> bool:
        try:
            return self.request("GET", "/health/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("locked")
    write_certificate(folder)
    port = free_port()
    # Some from the file, some as flags.
    config = configuration("fake", tls_cert=str(folder / "cert.pem"), cors_origins=[PAGE])
    keys = {"SLIMSERVE_API_KEY": KEY, "SLIMSERVE_ADMIN_KEY": ADMIN}
    arguments = ["--tls-key", str(folder / "key.pem"), "--metrics-port", str(port), "--no-openapi"]
    with fake_server(folder, config, *arguments, ready=False, environment=keys) as server:
        running = Locked(server, folder, port)
        wait_until(running.ready, "readiness over TLS")
        yield running


def test_streams_over_tls(locked: Locked) -> None:
    answer = locked.request("POST", "/v1/completions", KEY, json=BODY)
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len(re.findall("^data: {", answer.text, re.MULTILINE)) >= 1


def test_plain_http_gets_no_answer_from_a_tls_port(locked: Locked) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{locked.server.url}/health/live", timeout=PATIENCE)


def test_protocols_before_tls_1_2_are_refused(locked: Locked) -> None:
    context = ssl.create_default_context(cafile=str(locked.folder / "cert.pem"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with httpx.Client(verify=context) as client, pytest.raises(httpx.TransportError):
        client.get(f"{locked.url}/health/live", timeout=PATIENCE)


def test_metrics_are_on_their_port_alone_and_ask_for_a_key(locked: Locked) -> None:
    assert locked.request("GET", "/metrics", KEY).status_code == 404
    assert locked.request("GET", locked.metrics_url).status_code == 401
    for key in (KEY, ADMIN):
        page = locked.request("GET", locked.metrics_url, key)
        assert page.status_code == 200
        assert "slimserve_build_info" in page.text
    elsewhere = locked.metrics_url.removesuffix("/metrics")
    assert locked.request("GET", elsewhere + "/v1/models", KEY).status_code == 404
    assert locked.request("POST", elsewhere + "/admin/reload", ADMIN).status_code == 404


def test_the_description_can_be_switched_off(locked: Locked) -> None:
    assert locked.request("GET", "/openapi.json", KEY).status_code == 404


def test_the_admin_key_alone_opens_admin(locked: Locked) -> None:
    for key in ("", KEY, "wrong"):
        assert locked.request("POST", "/admin/reload", key).status_code == 401
    assert locked.request("POST", "/admin/reload", ADMIN).status_code == 200


def test_a_listed_origin_may_ask_and_read(locked: Locked) -> None:
    asked = locked.request("OPTIONS", "/v1/completions", headers={"origin": PAGE, **PREFLIGHT})
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    answer = locked.request("POST", "/v1/completions", KEY, json=BODY, headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    refused = locked.request("POST", "/v1/completions", json=BODY, headers={"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://evil.example.org", "https://app.example.org.evil.org", "null"])
def test_other_origins_may_not(locked: Locked, origin: str) -> None:
    asked = locked.request("OPTIONS", "/v1/completions", headers={"origin": origin, **PREFLIGHT})
    assert asked.status_code == 401
    answer = locked.request("GET", "/v1/models", KEY, headers={"origin": origin})
    assert not [name for name in (*asked.headers, *answer.headers) if name.startswith("access-control")]


def test_a_reload_takes_the_renewed_certificate(locked: Locked) -> None:
    write_certificate(locked.folder)
    assert not locked.ready()  # the server still shows the one that is trusted no more
    with httpx.Client(verify=False) as client:
        headers = {"authorization": f"Bearer {ADMIN}"}
        assert client.post(f"{locked.url}/admin/reload", headers=headers, timeout=PATIENCE).status_code == 200
    assert locked.ready()
    assert locked.request("GET", locked.metrics_url, KEY).status_code == 200


def test_a_server_without_keys_is_closed_to_pages_from_elsewhere(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration("fake")) as server:
        url = f"{server.url}/v1/models"
        for host in (None, "localhost:8000", f"127.0.0.1:{server.port}", "[::1]:8000", "slim.localhost", "box:8000"):
            headers = {} if host is None else {"host": host}
            assert httpx.get(url, headers=headers, timeout=PATIENCE).status_code == 200, host
        for host in (
            "evil.example.org",
            f"evil.example.org:{server.port}",
            "127.0.0.1.evil.example.org",
            "[evil.org",
            "ai.",
        ):
            answer = httpx.get(url, headers={"host": host}, timeout=PATIENCE)
            assert answer.status_code == 403, host
        asked = httpx.options(url, headers={"origin": PAGE, **PREFLIGHT}, timeout=PATIENCE)
        assert asked.status_code == 405
        assert not [name for name in asked.headers if name.startswith("access-control")]
        assert asked.headers["x-content-type-options"] == "nosniff"


def test_origins_can_be_given_as_flags(tmp_path: Path) -> None:
    other = "http://localhost:3000"
    with fake_server(tmp_path, configuration("fake"), "--cors-origin", PAGE, "--cors-origin", other) as server:
        for origin in (PAGE, other):
            asked = httpx.options(f"{server.url}/tokenize", headers={"origin": origin, **PREFLIGHT}, timeout=PATIENCE)
            assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, origin)


def wrong(tmp_path: Path, **options: object) -> str:
    """What a server says that does not start for these options."""
    config = configuration("fake", **options)
    with fake_server(tmp_path, config, ready=False) as server:
        assert server.wait() == 2
        return " ".join(server.log.split())


def test_files_that_cannot_serve_tls_are_refused_at_the_start(tmp_path: Path) -> None:
    write_certificate(tmp_path, password=b"secret")
    pair = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    assert "cannot be used" in wrong(tmp_path, **pair)
    write_certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_certificate(other)
    assert "not that of the certificate" in wrong(tmp_path, **(pair | {"tls_key": str(other / "key.pem")}))
    assert "no file" in wrong(tmp_path, **(pair | {"tls_key": str(tmp_path / "none.pem")}))
    assert "needs both" in wrong(tmp_path, tls_cert=pair["tls_cert"])


def test_settings_that_would_open_something_are_refused_at_the_start(tmp_path: Path) -> None:
    assert "--metrics-host 0.0.0.0" in wrong(tmp_path, metrics_port=0, metrics_host="0.0.0.0")
    assert "also an API key" in wrong(tmp_path, api_key=KEY, admin_key=KEY)
    assert "cors_origins" in wrong(tmp_path, cors_origins=["*"])
