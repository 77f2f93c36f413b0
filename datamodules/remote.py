"""Remote files (http://, s3://, any fsspec protocol): list them, ask for their sizes, copy them whole.

Every call runs its requests in an event loop of its own. When it returns, no loop, thread or connection is left that a
data loader worker could inherit by fork(). fsspec's synchronous interface keeps a thread for the life of the process.
"""

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datamodules.shards import ShardError

TIMEOUT_SECONDS = 30.0
"""For connecting over http, and for each wait for more bytes."""
WAIT_SECONDS = (1.0, 2.0, 4.0)
"""Pauses before a failed request is repeated."""
REQUESTS_AT_ONCE = 32
LISTED_ERRORS = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

Action = Callable[[Any, str], Awaitable[Any]]
"""A coroutine of a file system and a URL."""


def is_remote(location: str) -> bool:
    """Return whether a location is a URL (``protocol://``) rather than a local path."""
    return re.match(r"[A-Za-z][\w+.:-]*://", location) is not None


def check_location(location: str, config_key: str) -> None:
    """Accept a local path or a URL that can be read.

    Raises:
        ShardError: for ``pipe:``, a protocol that fsspec does not know, or one whose package is not installed.
    """
    if location.lstrip().startswith("pipe:"):
        raise ShardError(f"{config_key}={location!r} would run a shell command; give the URL itself (https://, s3://)")
    if not is_remote(location):
        return
    import fsspec

    protocol = location.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ShardError(
            f"{config_key}={location!r}: fsspec knows no protocol {protocol!r}; use https://, s3:// or a local path"
        ) from error
    except ImportError as error:
        remedy = "pip install '.[s3]'" if protocol in ("s3", "s3a") else f"install the package it needs ({error})"
        raise ShardError(f"{config_key}={location!r}: {protocol}:// cannot be read yet; {remedy}") from error


def expand(pattern: str, config_key: str) -> list[str]:
    """Return the sorted URLs of a pattern.

    Braces like ``{000000..000009}`` need no server. Wildcards ``*?[`` are resolved by listing the server's files.

    Raises:
        ShardError: as `check_location`; if braces do not match, nothing matches, or the server cannot list.
    """
    import braceexpand

    check_location(pattern, config_key)
    try:
        locations = set(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ShardError(f"{config_key}={pattern!r}: {error}; write braces like {{000000..000009}}") from error
    urls: set[str] = set()
    for location in locations:
        over_http = location.startswith(("http://", "https://"))  # a question mark begins the query of such a URL
        path = location.partition("://")[2].partition("/")[2]
        if not set(path) & set("*[" if over_http else "*?["):
            urls.add(location)
        elif over_http:
            raise ShardError(
                f"{config_key}={pattern!r}: a web server does not list its files; use braces like {{000000..000009}}, "
                "or put an index.json beside the shards"
            )
        else:
            urls.update(_listed(location, f"{config_key}={pattern!r}"))
    return sorted(urls)


def _listed(pattern: str, setting: str) -> list[str]:
    """Return the URLs of the files that match a wildcard pattern; raise ShardError with the setting if none does."""

    async def glob(system: Any, url: str) -> list[str]:
        stripped = system._strip_protocol(url)
        found = await _call(system, "glob", stripped, detail=True)
        names = [name for name, info in found.items() if info["type"] == "file"]
        if url.endswith(stripped):  # keep protocol and host as the user wrote them
            return [url.removesuffix(stripped) + name for name in names]
        return [system.unstrip_protocol(name) for name in names]

    (result,) = _on_each([pattern], glob)
    if isinstance(result, Exception):
        raise ShardError(
            f"{setting}: {pattern} cannot be listed ({_cause(result)}); check the address and the permission to list, "
            "or use braces like {000000..000009}"
        ) from result
    if not result:
        raise ShardError(f"{setting}: {pattern} matches no file; check the address")
    return result


def read_bytes(url: str) -> bytes | None:
    """Return the content of a small file, or None if it does not exist.

    Raises:
        ShardError: if the server does not answer or refuses, so that it is unknown whether the file exists.
    """

    async def read(system: Any, url: str) -> bytes:
        return await _call(system, "cat_file", system._strip_protocol(url))

    (result,) = _on_each([url], read)
    if isinstance(result, FileNotFoundError):
        return None
    if isinstance(result, Exception):
        raise ShardError(f"{url} cannot be read ({_cause(result)}); check the address and access") from result
    return result


def sizes(urls: Sequence[str]) -> list[int]:
    """Return the bytes of each shard. Many requests for metadata run at a time.

    Raises:
        ShardError: lists the shards that are missing, cannot be reached, or have no known size.
    """

    async def size(system: Any, url: str) -> int:
        info = await _call(system, "info", system._strip_protocol(url))
        if info["type"] != "file":
            raise IsADirectoryError("a folder, not a shard")
        if info["size"] is None:
            raise ValueError("the server does not tell the size, without which a copy cannot be checked")
        return int(info["size"])

    results = _on_each(urls, size)
    failed = [(url, result) for url, result in zip(urls, results, strict=True) if isinstance(result, Exception)]
    if failed:
        lines = [f"  {url} ({_cause(error)})" for url, error in failed[:LISTED_ERRORS]]
        if len(failed) > LISTED_ERRORS:
            lines.append(f"  and {len(failed) - LISTED_ERRORS} more")
        raise ShardError(
            "\n".join([f"{len(failed)} of {len(urls)} shards cannot be read; check address and access:", *lines])
        ) from failed[0][1]
    return results


def download(url: str, path: str, size: int) -> None:
    """Copy a remote file of ``size`` bytes. A failed attempt may leave a part of it at the path.

    Raises:
        ShardError: if all attempts fail or yield another number of bytes.
        OSError: if the local disk is full.
    """

    async def get(system: Any, url: str) -> None:
        await _call(system, "get_file", system._strip_protocol(url), path)
        found = os.path.getsize(path)
        if found != size:
            raise ShardError(f"got {found} bytes, expected {size}; was it replaced?")

    (error,) = _on_each([url], get)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise error
    if error is not None:
        raise ShardError(f"{url} cannot be downloaded ({_cause(error)}); check the address and access") from error


def _on_each(urls: Sequence[str], action: Action) -> list[Any]:
    """Return the result of an action for each URL, or the exception of its last attempt."""
    hosts: dict[str, list[str]] = {}
    for url in urls:
        hosts.setdefault("/".join(url.split("/", 3)[:3]), []).append(url)

    async def everything() -> dict[str, Any]:
        results: dict[str, Any] = {}
        for of_host in hosts.values():
            results.update(zip(of_host, await _on_host(of_host, action), strict=True))
        return results

    results = _run(everything())
    return [results[url] for url in urls]


async def _on_host(urls: list[str], action: Action) -> list[Any]:
    """Do the same for URLs of one host or bucket, which share their connections."""
    try:
        system = _file_system(urls[0])
        connect = getattr(system, "set_session", None) if system.async_impl else None
        session = await connect() if connect else None
    except Exception as error:
        return [error] * len(urls)
    # A file system without async methods may have a single connection, which threads cannot share.
    gate = asyncio.Semaphore(REQUESTS_AT_ONCE if system.async_impl else 1)

    async def attempt(url: str) -> Any:
        async with gate:
            for wait in (*WAIT_SECONDS, None):
                try:
                    return await action(system, url)
                except Exception as raised:
                    error = _actual(raised) if url.startswith("http") else raised
                    if wait is None or _is_final(error):
                        return error
                await asyncio.sleep(wait)

    try:
        return await asyncio.gather(*map(attempt, urls))
    finally:
        if session is not None:
            await session.close()


def _file_system(url: str) -> Any:
    """Return a new file system for this call only; credentials come from the environment or fsspec's configuration."""
    import fsspec
    from fsspec.config import conf

    protocol = url.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    options = kind._get_kwargs_from_urls(url) | {"skip_instance_cache": True}
    if kind.async_impl:
        options["asynchronous"] = True
    if protocol in ("http", "https"):
        import aiohttp

        given = conf.get("http", {}) | conf.get(protocol, {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True} | given.get("client_kwargs", {})
        options["headers"] = {"Accept-Encoding": "identity"} | given.get("headers", {})  # bytes as they are stored
    return kind(**options)


async def _call(system: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a file system, asynchronous or not."""
    if system.async_impl:
        return await getattr(system, f"_{method}")(*arguments, **options)
    return await asyncio.to_thread(getattr(system, method), *arguments, **options)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine, even where an event loop already runs (a notebook)."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _is_final(error: BaseException) -> bool:
    """Return whether another attempt is useless: no such file, no access, disk full."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return refused or disk or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError)


def _actual(error: Exception) -> BaseException:
    """Return the cause that fsspec's http file system hides behind FileNotFoundError when it asks for metadata."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
