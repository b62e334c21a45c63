"""A request in, a reply out: KServe v2 over gRPC and HTTP, and a REST API for people."""

import os

# Before gRPC is imported: the server forks only to run other programs, and gRPC would have a line to say of each, which is no JSON.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
