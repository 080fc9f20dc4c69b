"""The home on S3 of these tests."""

from ddsr_core.storage.remote_store import RemoteStore

URL = "s3://team/ddsr"
#: The home as two machines see it: two cache folders.
Machines = tuple[RemoteStore, RemoteStore]
