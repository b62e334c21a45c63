"""`python -m server.health`: whether the server in this container is ready, by exit status, for the image's HEALTHCHECK.

It runs every few seconds and imports nothing of the server. TLS may be the wish of a flag, which it does not see: then it asks twice.
"""

import os
import ssl
import sys
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

TRY_S = 1.0


def is_ready(port: str, tls_first: bool) -> bool:
    """Ask over HTTP and HTTPS, of which the server speaks one.

    One that wants a certificate, which this has not, leaves after the handshake: then it is there, and that has to do.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # its name is not 127.0.0.1
    for scheme in ("https", "http") if tls_first else ("http", "https"):
        try:
            with urlopen(f"{scheme}://127.0.0.1:{port}/v2/health/ready", timeout=TRY_S, context=context):
                return True
        except HTTPError:
            return False
        except URLError:  # nobody is there, or the handshake failed
            continue
        except (OSError, HTTPException) as error:
            if scheme == "https" and isinstance(error, ConnectionError):
                return True
    return False


if __name__ == "__main__":
    given = os.environ
    sys.exit(not is_ready(given.get("DINOSCOPE_HTTP_PORT", "8000"), tls_first="DINOSCOPE_TLS_CERT" in given))
