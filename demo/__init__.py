"""Replies of a running server -> pictures for people. A tab of the page is a file; nothing here knows the server's insides."""
