"""TLS as a store's URL describes it."""

import ssl

from kvlab.errors import ConfigError
from kvlab.stores.url import StoreURL


def tls_of(url: StoreURL) -> ssl.SSLContext:
    """Of the options `ca`, `cert`, `key`, `key_password` and `verify`."""
    ca, cert, key = (url.take(option, "") for option in ("ca", "cert", "key"))
    verify = url.take_bool("verify", True)
    secret = url.take_secret("key_password")
    if not url.reads_files:
        ca = cert = key = ""
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert or key:  # the empty password keeps OpenSSL from asking for one at the terminal
            context.load_cert_chain(cert or key, key or None, password=secret.reveal() if secret else "")
    except (OSError, ValueError) as error:
        what = "; an encrypted key needs key_password_file" if key or cert else ""
        raise ConfigError(f"cannot use the ca, cert or key of {url.shown!r}: {error}{what}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
