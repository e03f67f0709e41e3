"""`rediss://`: the certificate is checked by every client that we have, Celery's broker included."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from benchmarks.stack import free_port
from controlplane.settings import _broker

pytestmark = pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("openssl")), reason="needs redis-server with TLS, and openssl"
)


def make_certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate of 127.0.0.1."""
    certificate = folder / f"{name}.crt"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / f"{name}.key"), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *options, *files], check=True, capture_output=True)
    return certificate


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Redis that speaks TLS alone, with the certificate to trust it by."""
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    certificate = make_certificate(folder, "server")
    make_certificate(folder, "stranger")
    command = ["redis-server", "--port", "0", "--tls-port", str(port), "--save", "", "--dir", str(folder)]
    command += ["--tls-cert-file", str(certificate), "--tls-key-file", str(folder / "server.key")]
    command += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        with redis.Redis.from_url(url, retry=Retry(ConstantBackoff(0.05), 200)) as client:
            client.ping()
        yield url
        process.terminate()


def connect(url: str) -> None:
    with Celery(broker=_broker(url), set_as_current=False) as app, app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)


def test_celery_reaches_a_broker_whose_certificate_it_can_check(server: str) -> None:
    connect(server)


def test_celery_refuses_a_broker_with_another_certificate(server: str) -> None:
    with pytest.raises(OperationalError, match="certificate verify failed"):
        connect(server.replace("server.crt", "stranger.crt"))


def test_a_setting_of_the_url_is_kept_and_other_addresses_stay_as_they_are() -> None:
    assert _broker("rediss://h/0") == "rediss://h/0?ssl_cert_reqs=required"
    assert _broker("rediss://h/0?ssl_cert_reqs=none") == "rediss://h/0?ssl_cert_reqs=none"
    assert _broker("redis://h:1/0") == "redis://h:1/0"
