"""A request in, a reply out: KServe v2 over gRPC and HTTP, and a REST API for people."""
