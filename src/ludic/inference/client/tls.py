"""HTTPS to a server behind a proxy that has a certificate: whom both HTTP clients trust, and what a refusal means.

The settings are those that other programs go by: SSL_CERT_FILE or REQUESTS_CA_BUNDLE name a PEM file of certificates that are
trusted in place of, or beside, the system's. There is no switch that turns verification off: a self-signed certificate is
trusted by naming its file. Left out: client certificates.
"""

import os
import ssl
from collections.abc import Iterator
from typing import Any

from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH

TRUST = "put the PEM file of the certificate, or of the authority that signed it, into SSL_CERT_FILE"


def tls_context() -> ssl.SSLContext:
    """Trusts SSL_CERT_FILE (OpenSSL reads it) or the system's store and requests' own, and REQUESTS_CA_BUNDLE.

    Raises:
        ValueError: a variable names a file that cannot be read, or that holds no certificate.
    """
    context = ssl.create_default_context()
    if not os.environ.get("SSL_CERT_FILE"):
        # A Python that was built for another system does not find this system's store.
        context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        path = os.environ.get(name)
        if path:
            try:
                context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
            except (OSError, ssl.SSLError) as error:
                raise ValueError(
                    f"{name} names {path}, which cannot be read as certificates ({error.strerror or error}): "
                    "give a PEM file"
                ) from error
    return context


class TLSAdapter(HTTPAdapter):
    """requests with `tls_context` in the place of its own bundle."""

    def __init__(self, context: ssl.SSLContext, **options: Any) -> None:
        self._context = context
        super().__init__(**options)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing to set: the context verifies, and the pool requires it."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error of requests and what it wraps, down to that of the socket."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `reason` is how urllib3's MaxRetryError has it.
        wrapped = (getattr(error, "reason", None), error.__cause__, error.__context__, *error.args)
        error = next((one for one in wrapped if isinstance(one, BaseException)), None)


def tls_failure(error: BaseException) -> str:
    """What to say of a request that failed in the TLS handshake, with the way out; "" where it failed otherwise."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message}): {TRUST}"
        if isinstance(cause, ssl.SSLError):
            return f"it does not speak TLS as it should ({cause.reason or cause}): is it http:// that was meant?"
    return ""
