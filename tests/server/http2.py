"""gRPC calls as no library of it makes them: bytes of HTTP/2, of clients that say half of it, or take no reply."""

import socket

TAKE_NOTHING = (4).to_bytes(2, "big") + bytes(4)
"""A setting of HTTP/2: the first window of each stream is empty, so that no reply may be sent."""


def frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    """A frame (RFC 9113, section 4.1)."""
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def call(method: str, message: bytes, nbytes: int, settings: bytes = b"") -> bytes:
    """A connection's beginning with one call on it: its head, and this much of its message of so many bytes."""
    headers = {":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}"}
    headers |= {":authority": "x", "content-type": "application/grpc", "te": "trailers"}
    packed = b"".join(b"\0" + b"".join(bytes([len(one)]) + one.encode() for one in pair) for pair in headers.items())
    head = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, settings) + frame(1, 4, 1, packed)
    whole = len(message) == nbytes and method != "ModelStreamInfer"
    return head + frame(0, int(whole), 1, b"\0" + nbytes.to_bytes(4, "big") + message)


def send_call(
    address: str, method: str, message: bytes, nbytes: int | None = None, settings: bytes = b""
) -> socket.socket:
    """A connection that has said so; the message is whole unless it should have more bytes."""
    host, port = address.split(":")
    one = socket.create_connection((host, int(port)), 30)
    one.sendall(call(method, message, len(message) if nbytes is None else nbytes, settings))
    return one
