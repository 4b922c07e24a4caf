"""/upload and /download: files in and out of a sandbox, streamed both ways (protocol section 2)."""

from __future__ import annotations

import asyncio
import errno
import mimetypes
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from gatewayd.local import ranges
from gatewayd.local.envelope import ServiceError
from gatewayd.local.models import MAX_PATH
from gatewayd.local.pipes import close_fd
from gatewayd.local.rest_server import boxes_of
from gatewayd.local.runtime.base import FileWriter, RuntimeFailure
from gatewayd.local.sandbox import Run, Sandbox

READ_CHUNK = 256 * 1024  # bytes read from a file at a time
WRITE_CHUNK = 512 * 1024  # bytes gathered before they are written: each write is one trip to a thread

router = APIRouter()

PathQuery = Annotated[str, Query(min_length=1, max_length=MAX_PATH, pattern=r"^[^\x00]*$")]


class FilePart:
    """Picks the content of the part named ``file`` out of a multipart body (RFC 7578), as it comes."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ServiceError(400, "WriteError", "an upload is multipart/form-data with a part named 'file'")
        self.found = False  # the part has begun
        self.complete = False  # the part has ended
        self._data: list[bytes] = []  # its content since the last take()
        self._field = b""  # name of the header being read
        self._value = b""  # value of the header being read
        self._inside = False  # reading the wanted part
        self._name = b""  # name of the present part
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body. Raises ServiceError when it is malformed."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise ServiceError(400, "WriteError", f"the upload's multipart body is malformed: {exc}") from exc

    def take(self) -> list[bytes]:
        """The content parsed since the last call."""
        data, self._data = self._data, []
        return data

    def _on_part_begin(self) -> None:
        self._name = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._name = parse_options_header(self._value)[1].get(b"name", b"")
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        self._inside = self._name == b"file" and not self.found
        self.found = self.found or self._inside

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._data.append(data[start:end])

    def _on_part_end(self) -> None:
        self.complete = self.complete or self._inside
        self._inside = False


@router.post("/dataplane/{box_id}/upload")
async def upload(request: Request, box_id: str, path: PathQuery) -> dict[str, Any]:
    """Write a file. Its old content stays until the new one is complete."""
    boxes = boxes_of(request)
    sandbox = boxes.by_id(box_id)
    with sandbox.in_use():
        part = FilePart(request.headers.get("content-type", ""))
        run = await boxes.running(sandbox)
        try:
            writer = await run.box.open_write(path, _user(sandbox))
        except (OSError, RuntimeFailure) as exc:
            raise _file_error("WriteError", path, exc) from exc
        try:
            size = await _receive(request, part, writer)
            await writer.commit()
        except (OSError, RuntimeFailure) as exc:
            raise _file_error("WriteError", path, exc) from exc
        except ClientDisconnect as exc:
            raise ServiceError(400, "WriteError", f"cannot write {path}: the upload was broken off") from exc
        finally:
            await writer.abort()  # nothing after a commit
    return {"path": path, "size_bytes": size}


async def _receive(request: Request, part: FilePart, writer: FileWriter) -> int:
    """Stream the part into the writer and return its size."""
    waiting: list[bytes] = []
    gathered = size = 0
    async for data in request.stream():
        part.feed(data)
        for piece in part.take():
            waiting.append(piece)
            gathered += len(piece)
        if gathered >= WRITE_CHUNK:
            await asyncio.to_thread(_write_all, writer.fd, waiting)
            size += gathered
            waiting, gathered = [], 0
    if not part.complete:
        what = "is cut off" if part.found else "has no part named 'file'"
        raise ServiceError(400, "WriteError", f"the upload {what}")
    if waiting:
        await asyncio.to_thread(_write_all, writer.fd, waiting)
    return size + gathered


def _write_all(fd: int, pieces: list[bytes]) -> None:
    view = memoryview(b"".join(pieces))
    while view:
        view = view[os.write(fd, view) :]


@router.get("/dataplane/{box_id}/download")
@router.head("/dataplane/{box_id}/download")
async def download(request: Request, box_id: str, path: PathQuery) -> Response:
    """Read a file, or a range of it."""
    boxes = boxes_of(request)
    sandbox = boxes.by_id(box_id)
    with sandbox.in_use():
        run = await boxes.running(sandbox)
        fd, info = await _open(run, sandbox, path)
    try:
        return _answer(request, sandbox, path, fd, info)
    except BaseException:
        close_fd(fd)
        raise


def _answer(request: Request, sandbox: Sandbox, path: str, fd: int, info: os.stat_result) -> Response:
    """The answer for an open file; takes the descriptor over."""
    etag = ranges.etag_of(info)
    headers = {
        "ETag": etag,
        "Last-Modified": ranges.last_modified_of(info),
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }
    if ranges.unchanged(request.headers.get("if-none-match"), etag):
        close_fd(fd)
        return Response(status_code=304, headers=headers)
    part = None
    if request.method == "GET" and ranges.range_applies(request.headers.get("if-range"), etag, info):
        try:
            part = ranges.parse_range(request.headers.get("range"), info.st_size)
        except ranges.RangeNotSatisfiable:
            close_fd(fd)
            return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{info.st_size}"})
    start, end = part or (0, info.st_size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{info.st_size}"
    headers["Content-Length"] = str(end - start)
    media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
    if request.method == "HEAD":
        close_fd(fd)
        return Response(headers=headers, media_type=media_type)
    return _FileResponse(_FileBody(sandbox, fd, start, end), 206 if part is not None else 200, headers, media_type)


class _FileBody:
    """A file's bytes from `start` to `end`; owns the descriptor."""

    def __init__(self, sandbox: Sandbox, fd: int, start: int, end: int) -> None:
        self._sandbox = sandbox
        self._fd = fd
        self._start = start
        self._end = end
        self._open = True  # the descriptor is ours to close

    async def chunks(self) -> AsyncIterator[bytes]:
        offset = self._start
        with self._sandbox.in_use():
            while offset < self._end:
                data = await asyncio.to_thread(os.pread, self._fd, min(READ_CHUNK, self._end - offset), offset)
                if not data:
                    raise OSError(errno.EIO, "the file became shorter while it was read")
                offset += len(data)
                yield data

    def close(self) -> None:
        if self._open:
            self._open = False
            close_fd(self._fd)


class _FileResponse(StreamingResponse):
    """Streams a file and closes it, whether or not the client stays."""

    def __init__(self, body: _FileBody, status: int, headers: dict[str, str], media_type: str) -> None:
        super().__init__(body.chunks(), status, headers, media_type)
        self._body = body  # closed at the end of the answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._body.close()


async def _open(run: Run, sandbox: Sandbox, path: str) -> tuple[int, os.stat_result]:
    try:
        return await run.box.open_read(path, _user(sandbox))
    except (OSError, RuntimeFailure) as exc:
        raise _file_error("ReadError", path, exc) from exc


def _user(sandbox: Sandbox) -> str | None:
    """Files are read and written as the user commands run as."""
    user: str | None = (sandbox.record.run_config or {}).get("user")
    return user


def _file_error(kind: str, path: str, exc: OSError | RuntimeFailure) -> ServiceError:
    verb = "read" if kind == "ReadError" else "write"
    if not isinstance(exc, OSError):
        return ServiceError(400, "NotReady", f"cannot {verb} {path}: {exc}")
    message = f"cannot {verb} {path}: {exc.strerror or exc}"
    if kind == "ReadError" and exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return ServiceError(404, "FileNotFound", message)
    if exc.errno == errno.ENOSPC:
        message += ": free some in the sandbox, or on the machine that runs it"
    status = {errno.EACCES: 403, errno.EPERM: 403, errno.ENOSPC: 507, errno.EDQUOT: 507, errno.EFBIG: 413}.get(
        exc.errno or 0, 400
    )
    return ServiceError(status, kind, message)
