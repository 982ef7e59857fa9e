#!/usr/bin/env python3
"""A personal cloud in one file: store, serve, version, restore and sync a person's files.

    python3 cloudserver.py                  serve on this computer, data in ./cloud-data
    python3 cloudserver.py --help           every command and setting

The file reads bottom-up, like a house: a room uses only the rooms above it.

     1  Vocabulary      Config Principal Node Change Preconditions     the values that cross rooms
     2  Errors          ERRORS CloudError                              every refusal there is
     3  Grammar         parse_* format_* E read_xml                    text to values and back
     4  Blobs           ObjectDirectory Pieces cut                     the only code that opens data files
     5  Database        Database Batch SCHEMA MIGRATIONS               two calls: read and write
     6  Accounts        Accounts                                       who is asking
     7  Operations      Cloud                                          every verb, behind every door
     8  HTTP            Request Response route respond Handler         the only code that touches a socket
     9  JSON API        api_*                                          what the page and programs use
    10  Transfer        tus_* sync_*                                   resumable uploads, native sync
    11  WebDAV          dav_*                                          RFC 4918
    12  Nextcloud dialect  nc_* ocs_*                                  what its and ownCloud's clients expect
    13  Web pages       PAGE_* web_page                                the embedded page
    14  Service         CloudServer Janitor Supervisor                 start, stop, logs, background jobs
    15  Sync client     SyncClient LocalFolder SyncState               a folder and an account kept alike
    16  Command line    main                                           a function per command

The path of a request:

    socket > Handler.serve > Request > respond
        1 identify    Accounts       who is asking?
        2 find_route  ROUTES         which function?                    404 405
        3 admit       Route.needs    may they knock?                    401 403
        4 handler     rooms 9-13     words to values, one Cloud call, values to words
              Cloud                  this principal, on this node?      403 404 409 412 423 507
                  ObjectDirectory    bytes first, no lock held
                  Database           then guards, rows and one journal line, in one batch
        5 refuse      Route.refuse   how this dialect words a CloudError

Legend, kept to everywhere:

    who     a Principal, e.g. ann; ANONYMOUS if nobody    path   canonical segments: ("photos", "a.jpg"); the root is ()
    node    a file or collection as it is now             chunk  SHA-256 in hex of stored bytes, a part of a file
    home    the account whose tree a node hangs in        seq    number of a write; ETags and cursors are made of it
    at      wall clock, ms since 1970: shown to people    due    steady clock, ms: never jumps, decides what expires
"""
from __future__ import annotations

import argparse
import base64
import bisect
import errno
import getpass
import gzip
import hashlib
import hmac
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import locale
import logging
import math
import mimetypes
import mmap
import os
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Callable, Container, ContextManager, Iterable, Iterator, NamedTuple, Optional, Sequence
from urllib.parse import quote, unquote_to_bytes, urlsplit
from xml.parsers import expat

try:
    import fcntl
except ImportError:              # Windows
    fcntl = None
    import msvcrt

__version__ = "0.1.0"

log = logging.getLogger("cloudserver")


# ==== 1. Vocabulary ======================================================================
#
# Values that cross rooms.  All are immutable; a dict is for JSON alone.

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000      # milliseconds

INLINE_LIMIT = 64 * KiB         # chunks up to here live in their database row
CHUNK_SIZE = 4 * MiB            # where the server cuts what it receives
LARGE_CHUNK = 8 * MiB           # the same for bodies announced as larger than LARGE_BODY
LARGE_BODY = 16 * GiB
CHUNK_LIMIT = 16 * MiB          # no chunk is larger, whoever cut it
NAME_LIMIT = 255                # bytes of UTF-8 in a name
PATH_LIMIT = 4096               # bytes of UTF-8 in a path
DEPTH_LIMIT = 128               # levels below the root
FRAMES_LIMIT = 64 * MiB         # bytes of all chunks in one request
OPS_LIMIT = 5_000               # steps of one commit, and hashes in one question
PAGE_LIMIT = 10_000             # entries in one answer, and things named in one question
COPY_LIMIT = 200_000            # nodes that one COPY may make
XML_LIMIT = JSON_LIMIT = MiB    # bytes of a structured body
PROPERTY_LIMIT = 64 * KiB       # bytes of one dead property; a node holds 16 times that

INTEGERS = 1 << 63              # what is counted lies below; negative numbers down to its negative

FILE, COLLECTION = 0, 1         # Node.kind
ID_EPOCH = 1_577_836_800_000    # ms since 1970: 2020, where the clock inside ids begins


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of Config: `help` for people, `how` for argparse (metavar=, action=, type=)."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata={"help": help, **how})
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True)
class Config:
    """Every setting, once: command line, environment (CLOUDSERVER_PORT) and tests all read this class."""
    data: Path = option(Path("cloud-data"), "directory that holds everything", metavar="DIR")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all", metavar="ADDRESS")
    port: int = option(8765, "port to listen on; 0 picks a free one")
    workers: int = option(0, "processes that answer; 0 takes one per core, at most 8", metavar="N")
    tls_cert: Optional[Path] = option(None, "certificate chain, PEM; with it the server speaks HTTPS", metavar="FILE")
    tls_key: Optional[Path] = option(None, "its private key, PEM", metavar="FILE")
    behind_proxy: str = option("", "addresses of reverse proxies whose X-Forwarded-* count, e.g. 127.0.0.1,10.0.0.0/8",
                               metavar="CIDR")
    hostname: str = option("", "names clients may call this server by, besides its own and its addresses",
                           metavar="NAMES")
    plain_http: bool = option(False, "accept passwords over plain HTTP from other machines")
    quota: str = option("", "quota of new accounts, e.g. 50G; empty is none", metavar="SIZE")
    max_file: str = option("1T", "largest file", metavar="SIZE")
    keep_days: int = option(30, "days that every version and everything deleted is kept", metavar="DAYS")
    history: str = option("", "most that versions and deleted files of one account may take; empty is no limit",
                          metavar="SIZE")
    low_water: str = option("1G", "free space below which writes are refused (or 2 % of the disk, if that is less)",
                            metavar="SIZE")
    max_connections: int = option(2000, "open connections per process", metavar="N")
    access_log: str = option("", "file for the access log, combined format; - is standard output", metavar="FILE")
    quiet: bool = option(False, "log warnings and errors only")
    admin: str = option("", "on the first start make this account, an administrator, instead of printing a setup link", metavar="NAME")
    admin_password_file: Optional[Path] = option(None, "file that holds its password", metavar="FILE")
    windows_names: str = option("allow", "what to do with names Windows cannot hold: allow or refuse", metavar="POLICY")


class Policy(NamedTuple):
    """Settings that an administrator may change on the page."""
    keep_days: int               # days that every version and everything deleted is kept
    history: int | None          # bytes that versions and deleted files of one account may take; None is no limit
    quota: int | None            # of new accounts, bytes; None is none


class Principal(NamedTuple):
    """Somebody who asks, and by what means they proved who they are."""
    account: int = 0
    name: str = ""
    root: int = 0                # the collection that is "/" to them
    admin: bool = False
    means: str = ""              # "" nobody, "password", "token", "session", "local" (the command line)
    device: str = ""             # id of the device row behind a token or a session
    readonly: bool = False
    scoped: bool = False         # root is not the root of the account
    confirmed: int = 0           # due time until which the password counts as freshly given
    refusal: Optional["CloudError"] = None    # why credentials that were sent do not count


ANONYMOUS = Principal()


class Node(NamedTuple):
    """A file or collection as it was during [since, until); until is None now.  The order is that of NODE."""
    node: int
    home: int
    since: int
    until: int | None
    parent: int | None           # None for the root of a home
    name: str
    kind: int
    manifest: str | None         # what names its bytes; None for a collection
    size: int                    # bytes; of a collection: of all live files below it
    mtime: int                   # ms since 1970 as the client gave it, years 1 to 9999
    media: str | None            # media type; None for a collection
    rev: int                     # seq of the last change of content (file)
    fate: str | None             # why it ended: replaced, moved, deleted; None while live
    seq: int | None = None       # of a collection: seq of the last change anywhere below it
    files: int | None = None     # of a collection: live files below it

    @property
    def is_collection(self) -> bool:
        return self.kind == COLLECTION

    @property
    def etag(self) -> str:
        """Strong validator without its quotes: differs whenever the content does, survives a move."""
        return "%x-%x" % (self.seq if self.kind else self.rev, self.node)

    @property
    def created(self) -> int:
        """ms since 1970: node ids are drawn from the clock (see new_id)."""
        return (self.node >> 12) // 1000 + ID_EPOCH


class Change(NamedTuple):
    """One node leaves one state and takes another: the only thing any verb does to the tree.

        before  after     verb
        None    Node      create, copy, restore from the trash
        Node    Node      overwrite, move, rename, set the time, restore a version
        Node    None      delete

    `left` and `joined` are the collections that contain it before and after, root first.
    """
    before: Node | None
    after: Node | None
    left: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    fate: str = "replaced"       # what becomes of `before`


@dataclass(frozen=True)
class Preconditions:
    """What a request demands of the present state (RFC 9110 s13, RFC 4918 s10.4); () and None demand nothing."""
    if_match: tuple[str, ...] = ()                # entity tags without quotes; "*" is any
    if_none_match: tuple[str, ...] = ()
    unmodified_since: int | None = None           # ms since 1970
    modified_since: int | None = None             # reads only
    lists: tuple[tuple[tuple[str, ...] | None, tuple[tuple[bool, str, str], ...]], ...] = ()
    #                                               If: (resource or None, ((wanted, "token" or "etag", value), ...))
    tokens: frozenset[str] = frozenset()          # lock tokens submitted anywhere in If
    beside: bool = False                          # nothing: a new file takes a free name beside what is there


ANY = Preconditions()


@dataclass(frozen=True)
class Query:
    """What a search looks for; "", () and None ask for nothing."""
    words: tuple[str, ...] = ()                   # folded; all must be there
    without: tuple[str, ...] = ()                 # folded; none may be there
    within: str = ""                              # "names" or "contents"; "" is both
    kind: str = ""                                # one of KINDS, or "collection"
    least: int | None = None                      # bytes
    most: int | None = None
    after: int | None = None                      # mtime, ms since 1970
    before: int | None = None


class Lock(NamedTuple):
    """A write lock (RFC 4918 s6).  The order is that of the table's columns."""
    token: str
    home: int
    node: int
    account: int
    deep: bool                   # Depth: infinity
    exclusive: bool
    owner: str                   # the client's XML, as it sent it
    seconds: int                 # granted
    due: int                     # ends then, steady ms


# ==== 2. Errors ==========================================================================

ERRORS = {  # kind: (HTTP status, WebDAV condition or None)
    "bad-request": (400, None),
    "bad-checksum": (400, None),                          # what arrived is not what was announced
    "bad-frame": (400, None),                             # a frame that is cut short, empty or too long
    "unauthenticated": (401, None),
    "forbidden": (403, None),
    "insecure": (403, None),                              # a password over plain HTTP
    "cross-site": (403, None),                            # a foreign page drives the browser
    "unconfirmed": (403, None),                           # wants the password once more
    "infinite-depth": (403, "propfind-finite-depth"),     # RFC 4918 s9.1
    "no-such-report": (403, "supported-report"),          # RFC 3253 s3.6
    "bad-resource-type": (403, "valid-resourcetype"),     # RFC 5689 s3.3
    "protected-property": (403, "cannot-modify-protected-property"),
    "same-place": (403, None),                            # source and destination are one, or one holds the other
    "bad-sync-token": (403, "valid-sync-token"),          # RFC 6578 s3.2
    "not-found": (404, None),
    "method-not-allowed": (405, None),
    "timeout": (408, None),
    "conflict": (409, None),
    "no-parent": (409, None),                             # RFC 4918 s9.7.1
    "exists": (409, "resource-must-be-null"),
    "twin": (409, None),                                  # the same name in another Unicode form is there
    "no-token": (409, "lock-token-matches-request-uri"),  # RFC 4918 s9.11.1
    "offset": (409, None),                                # tus: the server stands elsewhere
    "missing": (409, None),                               # chunks that have to be sent first
    "op-reused": (409, None),                             # the same operation id for something else
    "other-history": (409, "valid-sync-token"),           # a cursor of a past that is not ours: the server went back in time
    "gone": (410, None),
    "length-required": (411, None),
    "precondition-failed": (412, None),
    "too-large": (413, None),
    "uri-too-long": (414, None),
    "unsupported-media": (415, None),
    "range-unsatisfiable": (416, None),
    "expectation-failed": (417, None),
    "misdirected": (421, None),                           # RFC 9110 s15.5.20
    "unprocessable": (422, None),
    "locked": (423, "lock-token-submitted"),              # RFC 4918 s11.3, s16
    "lock-conflict": (423, "no-conflicting-lock"),
    "held": (423, None),                                  # the brake: a device deletes or overwrites too much
    "not-done": (424, None),                              # another part of an atomic request failed
    "throttled": (429, None),
    "headers-too-large": (431, None),
    "bad-upload-checksum": (460, None),                   # tus checksum extension
    "internal": (500, None),
    "not-implemented": (501, None),
    "bad-gateway": (502, None),                           # a Destination on another server, RFC 4918 s9.8.5
    "busy": (503, None),
    "not-set-up": (503, None),
    "read-only": (503, None),
    "storage-failed": (503, None),
    "http-version": (505, None),
    "over-quota": (507, "quota-not-exceeded"),            # RFC 4331 s6
    "disk-full": (507, "sufficient-disk-space"),
    "too-many": (507, "number-of-matches-within-limits"),
}


class CloudError(Exception):
    """A refusal the client may read: raise CloudError("locked", "held by ann", href="/a.txt").

    `close` says that the connection cannot go on, because its framing is lost; the rest of `detail`
    is for the dialects: retry_after (seconds), allow, size, missing.
    """

    def __init__(self, kind: str, message: str = "", *, close: bool = False, **detail: Any) -> None:
        super().__init__(message or kind.replace("-", " "))
        self.kind, self.detail, self.close = kind, detail, close
        self.status, self.condition = ERRORS[kind]


class Conflict(Exception):
    """A guard of a batch did not hold: somebody was faster.  Read again and decide again."""


def reason_of(error: Exception) -> str:
    """What an error of the system, or ours, says to people, without the name of the file."""
    if getattr(error, "winerror", None) in (32, 33):             # ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION
        return "it is open in another program"
    return getattr(error, "strerror", None) or str(error)


# ==== 3. Grammar =========================================================================
#
# Text to values and back.  No file, clock or socket here; every function is total: it returns
# a value or raises a CloudError.

# ---- the head of a request (RFC 9112 s2-s5)

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(r"(%s) ([\x21\x22\x24-\x7e]+) HTTP/(\d)\.(\d)\r\n" % _TOKEN)
_FIELD = re.compile(r"(?<=\n)(%s):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n" % _TOKEN)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.\-_]+)(?::\d{1,5})?")
_LENGTH = re.compile(r"[0-9]{1,19}")

METHODS = frozenset("GET HEAD PUT POST PATCH DELETE OPTIONS PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK REPORT "
                    "SEARCH".split())
LIST_FIELDS = frozenset("accept accept-charset accept-encoding accept-language cache-control connection cookie forwarded "
                        "pragma prefer via x-forwarded-for".split())      # may come in several lines (RFC 9110 s5.3)
LINE_LIMIT, HEAD_LIMIT, FIELD_LIMIT = 16 * KiB, 64 * KiB, 100


class Head(NamedTuple):
    """The first lines of a request, checked."""
    method: str
    target: str
    minor: int                   # of HTTP/1.minor
    fields: dict[str, str]       # names in lower case


def refuse_head(kind: str, message: str) -> CloudError:
    return CloudError(kind, message, close=True)


def parse_head(head: bytes) -> Head:
    """Read request line and fields, up to and with the empty line (security.md H1-H8, H16).

    raises  CloudError, always with close: what follows on this connection cannot be trusted
    """
    text = head.decode("latin-1")
    line = _REQUEST_LINE.match(text)
    if not line:
        raise refuse_head("bad-request", "malformed request line")
    method, target, major, minor = line.groups()
    if major != "1" or minor not in "01":
        raise refuse_head("http-version", "this server speaks HTTP/1.1")
    if line.end() > LINE_LIMIT:
        raise refuse_head("uri-too-long", "request line over %d bytes" % LINE_LIMIT)
    if method not in METHODS:
        raise refuse_head("not-implemented", "unknown method")
    found = _FIELD.findall(text, line.end() - 1)
    if len(found) != text.count("\n", line.end()) - 1:       # each line is a field, or the empty one at the end
        raise refuse_head("bad-request", "malformed header field")
    values = {name.lower(): value.strip(" \t") for name, value in found}
    if len(values) != len(found):
        values = join_fields(found)
    if len(found) > FIELD_LIMIT:
        raise refuse_head("headers-too-large", "over %d header fields" % FIELD_LIMIT)
    host = values.get("host")
    if host is None and minor == "1" or host is not None and not _HOST.fullmatch(host):
        raise refuse_head("bad-request", "missing or malformed Host")
    return Head(method, target, int(minor), values)


def join_fields(found: list[tuple[str, str]]) -> dict[str, str]:
    """Merge repeated fields that are lists; refuse any other repetition (H16)."""
    values: dict[str, str] = {}
    for name, value in found:
        name, value = name.lower(), value.strip(" \t")
        if name in values and name not in LIST_FIELDS:
            raise refuse_head("bad-request", "repeated header field")
        separator = "; " if name == "cookie" else ", "
        values[name] = values[name] + separator + value if name in values else value
    return values


def parse_framing(head: Head) -> int | None:
    """How long is the body?  0 none, n bytes, None chunked (RFC 9112 s6; H9-H11)."""
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if coding is None:
        if length is None:
            return 0
        if not _LENGTH.fullmatch(length):
            raise refuse_head("bad-request", "malformed Content-Length")
        return int(length)
    if length is not None or head.minor == 0:
        raise refuse_head("bad-request", "Transfer-Encoding does not go with that")
    if coding.lower() != "chunked":
        raise refuse_head("not-implemented", "only the chunked transfer coding is known")
    return None


_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%(token)b(?:[ \t]*=[ \t]*(?:%(token)b|"
    rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"))?)*)' % {b"token": _TOKEN.encode()})


def parse_chunk_line(line: bytes) -> tuple[int, bytes]:
    """(bytes in the chunk, its extensions) of the line that begins it, without CRLF (RFC 9112 s7.1, s7.1.1; H12)."""
    found = _CHUNK_LINE.fullmatch(line)
    if not found:
        raise refuse_head("bad-request", "malformed chunk")
    return int(found[1], 16), found[2]


# ---- paths and names (security.md P)

_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f/\\]")
_NONCHARACTER = re.compile("[\ufdd0-\ufdef\ufffe\uffff%s]" %
                           "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)))
_WINDOWS = re.compile(r'(?i)(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(?:\..*)?|.*[<>:"|?*].*|.*[. ]')
_LATIN = re.compile(rb"(?:[\x20-\x7e\xa0-\xbf]|[\xc0-\xfd](?![\x80-\xbf]))+")     # text, and no byte leads a sequence of UTF-8
_HOP = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d{1,5})?|(\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?|([0-9A-Fa-f:.]+)")
_PLAIN = re.compile(r"[A-Za-z0-9_.~/\-]*")      # what quote() leaves alone
_SIMPLE = re.compile(r"(?:/\w[\w.~+@,=:!$&'()*;\-]*)+", re.ASCII)       # a path of which nothing needs to be checked


def parse_target(target: str) -> tuple[str, tuple[str, ...], bool, str]:
    """Split a request target: (authority or "", path, whether it ends in a slash, query).

    Takes the origin form and the absolute form (RFC 9112 s3.2); percent-decoding happens here, once.
    """
    authority = ""
    if not target.startswith("/"):
        scheme, mark, rest = target.partition("://")
        if not mark or scheme.lower() not in ("http", "https"):
            raise CloudError("bad-request", "malformed request target")
        authority, slash, rest = rest.partition("/")
        if not _HOST.fullmatch(authority):
            raise CloudError("bad-request", "malformed authority")
        target = slash + rest or "/"
    raw, _, query = target.partition("?")
    path, slash = parse_path(raw)
    return authority, path, slash, query


def parse_path(raw: str) -> tuple[tuple[str, ...], bool]:
    """Split an encoded path into decoded names; the bool tells a final slash.

    Slashes that repeat count as one, as with nearly every other server.
    raises  CloudError bad-request for names no node may have, uri-too-long for a path that is
    """
    parts = raw.split("/")
    if len(raw) < NAME_LIMIT and _SIMPLE.fullmatch(raw):
        return tuple(parts[1:]), False
    if parts[0]:
        raise CloudError("bad-request", "a path begins with a slash")
    slash = len(parts) > 1 and not parts[-1]
    parts = [part for part in parts if part]
    if "%" in raw:
        if _ESCAPE.search(raw):
            raise CloudError("bad-request", "malformed percent-encoding")
        parts = [unquote_name(part) for part in parts]
    return check_path(parts), slash


def unquote_name(part: str) -> str:
    """Percent-decode a name: UTF-8, or Latin-1 if it cannot be broken UTF-8 (Total Commander; sabre reads it so, too)."""
    data = unquote_to_bytes(part)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        if _LATIN.fullmatch(data):
            return data.decode("latin-1")
        raise CloudError("bad-request", "a name is not UTF-8") from None


def check_path(names: Iterable[str]) -> tuple[str, ...]:
    """The names of a path, each checked: what every door lets through to the operations (P3-P7, P12)."""
    path = tuple(names)
    for name in path:
        check_name(name)
    if sum(map(len, path)) + len(path) > 1024 and len("/".join(path).encode()) > PATH_LIMIT:
        raise CloudError("uri-too-long", "path over %d bytes" % PATH_LIMIT)
    return path


def check_name(name: str) -> None:
    """raises CloudError bad-request for a name that no node may have."""
    if not name or name in (".", "..") or _BAD_NAME.search(name):
        raise CloudError("bad-request", "a name may not be empty, . or .., or hold / \\ or control characters")
    if not name.isascii():
        if _NONCHARACTER.search(name):
            raise CloudError("bad-request", "a name holds a Unicode non-character")
        try:
            size = len(name.encode("utf-8"))
        except UnicodeEncodeError:
            raise CloudError("bad-request", "a name is not UTF-8") from None
    else:
        size = len(name)
    if size > NAME_LIMIT:
        raise CloudError("bad-request", "name over %d bytes" % NAME_LIMIT)


def is_windows_name(name: str) -> bool:
    """Can Windows hold a file of this name?"""
    return not _WINDOWS.fullmatch(name)


def key_of(name: str) -> str:
    """What names are compared by: their NFC form (P9)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def split_path(text: str) -> tuple[str, ...]:
    """A path as people and JSON write it, "photos/a.jpg", to its checked names; slashes at the ends are ignored."""
    if not isinstance(text, str):
        raise CloudError("bad-request", "a path must be a string")
    text = text.strip("/")
    return check_path(text.split("/")) if text else ()


def format_path(path: Sequence[str]) -> str:
    """("a", "b c") to "/a/b%20c"."""
    text = "/" + "/".join(path)
    return text if _PLAIN.fullmatch(text) else quote(text, safe="/~")


def parse_hop(text: str) -> str:
    """An address as proxies write it into X-Forwarded-For: 192.0.2.1, 192.0.2.1:4711, 2001:db8::1, [2001:db8::1]:4711.

    raises CloudError for "unknown", a name, an interface ("%eth0") and anything else
    """
    found = _HOP.fullmatch(text.strip())
    try:
        address = ipaddress.ip_address(found[1] or found[2] or found[3] if found else "")
    except ValueError:
        raise CloudError("bad-request", "X-Forwarded-For holds something that is no address") from None
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_query(query: str) -> dict[str, str]:
    """Decode a query or a form; the last of equal names wins (P1)."""
    return dict(parse_pairs(query))


def parse_pairs(query: str) -> list[tuple[str, str]]:
    """Decode a query or a form, in order.  raises CloudError bad-request for what is not text."""
    pairs = []
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        pairs.append((unquote_name(name.replace("+", " ")), unquote_name(value.replace("+", " "))))
    if "%00" in query and "\0" in "".join(map("".join, pairs)):
        raise CloudError("bad-request", "a text may not hold a NUL")
    return pairs


def parse_id(value: Any) -> int:
    """An id or a version as JSON writes it: a string of digits, for it may have more than JavaScript's numbers hold."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value) and int(value) < INTEGERS:
        return int(value)
    raise CloudError("bad-request", "an id is a string of digits")


# ---- times

_EPOCH = datetime(1970, 1, 1)
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_HTTP_DATES = (
    re.compile(r"\w{3}, (?P<d>\d\d) (?P<b>\w{3}) (?P<Y>\d{4}) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d) GMT"),
    re.compile(r"\w{6,9}, (?P<d>\d\d)-(?P<b>\w{3})-(?P<y>\d\d) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d) GMT"),
    re.compile(r"\w{3} (?P<b>\w{3}) (?P<d>[ \d]\d) (?P<H>\d\d):(?P<M>\d\d):(?P<S>\d\d) (?P<Y>\d{4})"))
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d:?\d\d)?)?")
MTIME_MIN = -62_135_596_800_000                  # year 1
MTIME_MAX = 253_402_300_799_999                  # year 9999


@lru_cache(maxsize=4096)
def format_http_date(at: int) -> str:
    """ms since 1970 to "Mon, 23 Nov 2026 13:00:00 GMT" (RFC 9110 s5.6.7)."""
    moment = _EPOCH + timedelta(seconds=at // 1000)
    return "%s, %02d %s %04d %02d:%02d:%02d GMT" % (
        _DAYS[moment.weekday()], moment.day, _MONTHS[moment.month - 1], moment.year,
        moment.hour, moment.minute, moment.second)


def parse_http_date(text: str) -> int | None:
    """The reverse, in all three forms of RFC 9110 s5.6.7; None for what is no date, which asks nothing."""
    for form in _HTTP_DATES:
        found = form.fullmatch(text)
        if found:
            part = found.groupdict()
            year = int(part["Y"]) if "Y" in part else 1900 + int(part["y"]) + (100 if int(part["y"]) < 70 else 0)
            try:
                moment = datetime(year, _MONTHS.index(part["b"]) + 1, int(part["d"]),
                                  int(part["H"]), int(part["M"]), min(int(part["S"]), 59))
            except ValueError:
                return None
            return (moment - _EPOCH) // timedelta(milliseconds=1)
    return None


def format_time(at: int) -> str:
    """ms since 1970 to "2026-11-23T13:00:00.000Z" (RFC 3339)."""
    return (_EPOCH + timedelta(milliseconds=at)).isoformat(timespec="milliseconds") + "Z"


def parse_time(value: Any) -> int:
    """ms since 1970 of an RFC 3339 text (UTC where it names no zone) or of a number of ms.

    raises  CloudError bad-request
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return check_mtime(value)
    found = _ISO.fullmatch(value) if isinstance(value, str) else None
    if found:
        year, month, day, hour, minute, second, fraction, zone = found.groups(default="0")
        try:
            moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second))
            at = (moment - _EPOCH) // timedelta(milliseconds=1) + int((fraction + "000")[:3])
        except (ValueError, OverflowError):
            raise CloudError("bad-request", "no such time") from None
        if zone not in ("0", "Z"):
            minutes = int(zone[1:3]) * 60 + int(zone[-2:])
            at -= minutes * MINUTE * (1 if zone[0] == "+" else -1)
        return check_mtime(at)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,15}", value):
        return check_mtime(int(value))
    raise CloudError("bad-request", "not a time")


def parse_seconds(text: str | None) -> int | None:
    """ms of seconds since 1970, perhaps with a fraction; None for None.  raises CloudError bad-request"""
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,12}(\.\d{1,9})?", text):
        raise CloudError("bad-request", "malformed time")
    return check_mtime(int(float(text) * 1000))


def check_mtime(at: int) -> int:
    if not MTIME_MIN <= at <= MTIME_MAX:
        raise CloudError("bad-request", "a time must be in the years 1 to 9999")
    return at


# ---- sizes

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.I)
_UNITS = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB, "P": 1 << 50}


def parse_size(text: str) -> int:
    """Bytes of "10G", "1.5 MiB", "4096".  raises CloudError bad-request."""
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[found[2].upper()] if found else math.inf
    if not size < INTEGERS:
        raise CloudError("bad-request", "not a size: %r (write 500M, 10G, 2T)" % text[:64])
    return int(size)


def format_size(size: float) -> str:
    """1536 to "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return "%d %s" % (size, unit) if unit == "B" else "%.1f %s" % (size, unit)
        size /= 1024
    raise AssertionError


# ---- conditions and ranges

_ETAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"|[^\s,][^,]*')
NO_ETAG = "\0"                  # no node has it
_RANGE = re.compile(r"(\d*)-(\d*)")
RANGES_LIMIT = 8


def parse_etags(text: str, *, weak: bool) -> tuple[str, ...]:
    """Read an If-Match or If-None-Match field: ("*",) or tags without quotes (RFC 9110 s13.1).

    weak    whether weak tags count; in If-Match they match nothing (s8.8.3.2)

    What is no tag matches nothing, too: Joplin sends `If-None-Match: JoplinIgnore-12345` with nearly every request.
    """
    if text.strip() == "*":
        return ("*",)
    return tuple([found[2] if found[2] is not None and (weak or not found[1]) else NO_ETAG
                  for found in _ETAG.finditer(text)]) or (NO_ETAG,)


def parse_ranges(text: str, size: int) -> list[tuple[int, int]] | None:
    """Read a Range field; return the half-open intervals of bytes it asks for.

    text    raw field value, e.g. "bytes=0-499,-500"                      (RFC 9110 s14.1.2)
    size    length of the file, bytes
    return  [(start, stop), ...] with 0 <= start < stop <= size; None for a form we ignore, as s14.2
            permits: another unit, more than 8 ranges, ranges that overlap, any of an empty file
    raises  CloudError range-unsatisfiable if no byte of any range exists
    """
    unit, mark, rest = text.partition("=")
    if not mark or unit.strip().lower() != "bytes" or not rest.isascii() or not size:
        return None
    ranges = []
    for part in rest.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found or found[0] == "-" or len(found[0]) > 40:
            return None
        if found[1]:
            start, stop = int(found[1]), int(found[2]) + 1 if found[2] else size
            if stop <= start and found[2]:
                return None
        else:
            start, stop = max(0, size - int(found[2])), size
        if start < min(stop, size):
            ranges.append((start, min(stop, size)))
    if not ranges:
        raise CloudError("range-unsatisfiable", "the file has %d bytes" % size, size=size)
    ordered = sorted(ranges)
    if len(ranges) > RANGES_LIMIT or any(a[1] > b[0] for a, b in zip(ordered, ordered[1:])):
        return None
    return ranges


# ---- fields of WebDAV (RFC 4918 s10)

_BARE_TOKEN = re.compile(r"(?:urn:uuid|opaquelocktoken):[0-9A-Za-z:.\-]{1,256}")         # webdav 5 for JavaScript, to refresh a lock
_IF_PART = re.compile(r'\s*(?:<([^<>"\s]{1,4096})>|(\()|(\))|(Not)(?=[\s<\[])|\[((?:W/)?"[^"\s]{0,256}")\])', re.I)


def parse_depth(text: str | None, default: str) -> str:
    """"0", "1" or "infinity"; the default for another depth, and for what is none.

    Old Office programs send "1,noroot"; nc-py-api any number of levels.
    """
    depth = (text or "").partition(",")[0].strip().lower()
    return depth if depth in ("0", "1", "infinity") else default


def parse_timeout(text: str | None, default: int, most: int) -> int:
    """Seconds asked for by a Timeout field, at most `most`; the first form we know counts (s10.7)."""
    for part in (text or "").split(",")[:16]:
        part = part.strip()
        if part.lower() == "infinite":
            return most
        found = re.fullmatch(r"Second-(\d{1,10})", part, re.I)
        if found:
            return max(1, min(most, int(found[1])))
    return default


_LOCK_TOKEN = re.compile(r"<([^<>\s]{1,256})>|([^<>\s]{1,256})")


def parse_lock_token(text: str) -> str:
    """The token in a Lock-Token field, without its brackets, which webdav 5 for JavaScript leaves away (s10.5)."""
    found = _LOCK_TOKEN.fullmatch(text)
    if not found:
        raise CloudError("bad-request", "malformed Lock-Token")
    return found[1] or found[2]


def parse_overwrite(text: str | None) -> bool:
    if text is None or text.upper() == "T":
        return True
    if text.upper() == "F":
        return False
    raise CloudError("bad-request", "malformed Overwrite")


def parse_if(text: str) -> tuple[tuple[str | None, tuple[tuple[bool, str, str], ...]], ...]:
    """Read an If field: lists of conditions, of which one must hold entirely (s10.4).

    return  ((resource as written or None, ((wanted, "token" or "etag", value), ...)), ...)
    """
    if _BARE_TOKEN.fullmatch(text):
        return ((None, ((True, "token", text),)),)
    lists, resource, current, wanted, at = [], None, None, True, 0
    while text[at:].strip():
        found = _IF_PART.match(text, at)
        if not found:
            raise CloudError("bad-request", "malformed If")
        at = found.end()
        uri, opened, closed, negated, etag = found.groups()
        if current is None:                              # between lists
            if opened:
                current = []
            elif uri:
                resource = uri
            else:
                raise CloudError("bad-request", "malformed If")
        elif closed and current and wanted:
            lists.append((resource, tuple(current)))
            current = None
        elif negated and wanted:
            wanted = False
        elif uri or etag:
            current.append((wanted, "token", uri) if uri else (wanted, "etag", etag.strip('"')))
            wanted = True
        else:
            raise CloudError("bad-request", "malformed If")
        if len(lists) > 100 or current is not None and len(current) > 100:
            raise CloudError("bad-request", "If is too long")
    if not lists or current is not None:
        raise CloudError("bad-request", "malformed If")
    return tuple(lists)


# ---- other fields

_CHECKSUMS = {"SHA1": "sha1", "MD5": "md5", "SHA256": "sha256", "SHA3-256": "sha3_256", "ADLER32": "adler32"}


def parse_checksum(text: str) -> tuple[str, str]:
    """"SHA1:0a4d..." to ("sha1", "0a4d..."), the form of OC-Checksum."""
    kind, mark, value = text.partition(":")
    name = _CHECKSUMS.get(kind.strip().upper())
    if not mark or name is None or not re.fullmatch(r"[0-9A-Fa-f]{8,128}", value.strip()):
        raise CloudError("bad-request", "unknown checksum")
    return name, value.strip().lower()


def parse_basic(text: str) -> tuple[str, str] | None:
    """Name and password of an Authorization field's value after "Basic " (RFC 7617); None if malformed."""
    try:
        name, mark, password = base64.b64decode(text.strip(), validate=True).decode("utf-8").partition(":")
    except ValueError:
        return None
    return (name, password) if mark else None


_METADATA = re.compile(r"([^\s,]+)(?: ([A-Za-z0-9+/=]*))?")


def parse_metadata(text: str) -> dict[str, str]:
    """Upload-Metadata: "path cGF0aA==,mtime MTAwMA==" to {"path": "path", ...}."""
    found = {}
    for part in text.split(",") if text else ():
        pair = _METADATA.fullmatch(part.strip())
        try:
            found[pair[1]] = base64.b64decode(pair[2] or "", validate=True).decode("utf-8")
        except (TypeError, ValueError):
            raise CloudError("bad-request", "malformed Upload-Metadata") from None
    return found


_NOT_IN_FILENAME = re.compile(r"""[^ !#$&'()+,\-.0-9=@A-Z\[\]^_a-z{}~]""")


def format_disposition(name: str, *, inline: bool = False) -> str:
    """A Content-Disposition field that gives `name` safely (RFC 6266, RFC 8187; H23).

    Who knows only `filename`, like curl -OJ, gets the nearest plain name (RFC 6266 appendix D).
    """
    plain = '%s; filename="%s"' % ("inline" if inline else "attachment", _NOT_IN_FILENAME.sub("_", name))
    return plain if _PLAIN.fullmatch(name) else "%s; filename*=UTF-8''%s" % (plain, quote(name, safe=""))


def format_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def parse_json(body: bytes) -> dict[str, Any]:
    """One JSON object, of which every text can be encoded and stored, and every number has 63 bits.

    raises  CloudError bad-request
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_int=_parse_integer, parse_float=_parse_float, parse_constant=_parse_float)
        if "\\u" in text:                       # lone surrogates come only by escapes, and NUL, too
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise CloudError("bad-request", "the body is not JSON") from None
    if not isinstance(value, dict) or _NUL.search(text):
        raise CloudError("bad-request", "the body must be a JSON object, without NUL")
    return value


def _parse_integer(text: str) -> int:
    """raises ValueError beyond what a database holds"""
    value = int(text) if len(text) < 21 else INTEGERS
    if not -INTEGERS <= value < INTEGERS:
        raise ValueError
    return value


def _parse_float(text: str) -> float:
    """raises ValueError for NaN and what is infinite"""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


# ---- XML: one reader, one writer

XML_DEPTH, XML_ELEMENTS, XML_ATTRIBUTES = 64, 20_000, 256
NAMESPACES = {"DAV:": "d", "http://owncloud.org/ns": "oc", "http://nextcloud.org/ns": "nc",
              "http://sabredav.org/ns": "s"}


class Markup(str):
    """Text that is XML already; E leaves it as it is."""
    __slots__ = ()


def escape(text: str) -> str:
    if "&" in text:
        text = text.replace("&", "&amp;")
    if "<" in text:
        text = text.replace("<", "&lt;")
    if ">" in text:
        text = text.replace(">", "&gt;")
    return text


def E(tag: str, *content: str, **attributes: str) -> Markup:
    """An element: E("d:href", "/a&b") is <d:href>/a&amp;b</d:href>.

    tag      "d:href" with a prefix of NAMESPACES, or "{namespace}name" for any other
    content  Markup goes in as it is, other text is escaped
    """
    opening = tag
    if tag[0] == "{":
        namespace, _, tag = tag[1:].rpartition("}")
        prefix = NAMESPACES.get(namespace)
        if prefix:
            opening = tag = prefix + ":" + tag
        else:
            opening = '%s xmlns="%s"' % (tag, escape(namespace).replace('"', "&quot;"))
    for name, value in attributes.items():
        opening += ' %s="%s"' % (name.replace("_", ":"), escape(value).replace('"', "&quot;"))
    inner = "".join([part if isinstance(part, Markup) else escape(part) for part in content])
    return Markup("<%s>%s</%s>" % (opening, inner, tag) if inner else "<%s/>" % opening)


def format_xml(root: Markup) -> bytes:
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + root.encode("utf-8")


def read_xml(body: bytes) -> ET.Element:
    """Parse a request body (security.md X1-X5); tags come as "{namespace}name".

    raises  CloudError bad-request for a document type, bad nesting, or more than a request needs

    Blanks before the XML declaration and NULs behind the end are overlooked (Windows 11 in LOCK); in UTF-16 they are text.
    """
    if body[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\0" not in body[:2]:
        body = body.lstrip(b" \t\r\n").rstrip(b" \t\r\n\0")
    builder, depth, count = ET.TreeBuilder(), 0, 0
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True

    def braced(name: str) -> str:
        return "{" + name if "}" in name else name

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > XML_DEPTH or count > XML_ELEMENTS or len(attributes) > XML_ATTRIBUTES:
            raise CloudError("bad-request", "the XML is too deep or too long")
        builder.start(braced(tag), {braced(name): value for name, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(braced(tag))

    def doctype(*_: Any) -> None:
        raise CloudError("bad-request", "a document type is not allowed")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, doctype
    try:
        parser.Parse(body, True)
    except (expat.ExpatError, LookupError, ValueError):
        raise CloudError("bad-request", "the body is not well-formed XML") from None
    return builder.close()


# ---- QR codes (ISO 18004): bytes, correction level M, versions 1 to 10, mask 0

_QR_TOTAL = (26, 44, 70, 100, 134, 172, 196, 242, 292, 346)     # codewords of each version
_QR_CHECK = (10, 16, 26, 18, 24, 16, 18, 22, 22, 26)            # of them to correct by, in each block
_QR_BLOCKS = (1, 1, 1, 2, 2, 4, 4, 4, 5, 5)


def qr_code(text: str) -> list[list[bool]]:
    """The squares of a QR code, row by row, True is dark; four light ones belong around it.

    raises  CloudError too-large beyond 213 bytes of UTF-8
    """
    data = text.encode()
    version = next((n for n in range(1, 11) if _qr_room(n) >= len(data) + (2 if n < 10 else 3)), 0)
    if not version:
        raise CloudError("too-large", "this is too long for a code to scan")
    size = version * 4 + 17
    grid: list[list[bool | None]] = [[None] * size for _ in range(size)]
    _qr_marks(grid, version)
    bits = (word >> (7 - n) & 1 for word in _qr_codewords(data, version) for n in range(8))
    for right in (*range(size - 1, 6, -2), 5, 3, 1):             # up and down in columns of two, from the right
        for step in range(size):
            y = step if right + (right < 6) & 2 else size - 1 - step
            for x in (right, right - 1):
                if grid[y][x] is None:
                    grid[y][x] = bool(next(bits, 0) ^ ((x + y) % 2 == 0))
    return [[bool(dark) for dark in row] for row in grid]


def _qr_room(version: int) -> int:
    """Codewords that a version has for data."""
    return _QR_TOTAL[version - 1] - _QR_CHECK[version - 1] * _QR_BLOCKS[version - 1]


def _qr_marks(grid: list[list[bool | None]], version: int) -> None:
    """What is the same whatever the code says: finders, alignment, timing, format and version."""
    size = len(grid)

    def dot(x: int, y: int, dark: int | bool) -> None:
        if 0 <= x < size and 0 <= y < size:
            grid[y][x] = bool(dark)

    def square(x: int, y: int, radius: int, *light: int) -> None:
        for i in range(-radius, radius + 1):
            for j in range(-radius, radius + 1):
                dot(x + i, y + j, max(abs(i), abs(j)) not in light)

    for x, y in ((3, 3), (size - 4, 3), (3, size - 4)):
        square(x, y, 4, 2, 4)
    spots = () if version == 1 else (6, size - 7) if version < 7 else (6, version * 2 + 8, size - 7)
    for x, y in itertools.product(spots, spots):
        if grid[y][x] is None:
            square(x, y, 2, 1)
    for n in range(8, size - 8):
        dot(n, 6, n % 2 == 0)
        dot(6, n, n % 2 == 0)
    form, about = _qr_rest(0, 10, 0x537) ^ 0x5412, version << 12 | _qr_rest(version, 12, 0x1F25)   # level M, mask 0: 00000
    for n in range(15):
        dot(8, n if n < 6 else n + 1 if n < 8 else size - 15 + n, form >> n & 1)
        dot(size - 1 - n if n < 8 else 7 if n < 9 else 14 - n, 8, form >> n & 1)
    dot(8, size - 8, True)
    for n in range(18 if version > 6 else 0):
        dot(n // 3, size - 11 + n % 3, about >> n & 1)
        dot(size - 11 + n % 3, n // 3, about >> n & 1)


def _qr_rest(value: int, bits: int, divisor: int) -> int:
    """What is left of a polynomial over GF(2), shifted by `bits`, when it is divided."""
    rest = value
    for _ in range(bits):
        rest = rest << 1 ^ (rest >> bits - 1) * divisor
    return rest


def _qr_codewords(data: bytes, version: int) -> list[int]:
    """Mode, length and bytes, filled up and cut into blocks, each with its Reed-Solomon check; then woven together."""
    room, blocks, check = _qr_room(version), _QR_BLOCKS[version - 1], _QR_CHECK[version - 1]
    bits = "0100" + format(len(data), "016b" if version > 9 else "08b") + "".join(format(byte, "08b") for byte in data)
    bits += "0" * min(4, room * 8 - len(bits))
    bits += "0" * (-len(bits) % 8)
    words = [int(bits[at:at + 8], 2) for at in range(0, len(bits), 8)]
    words += itertools.islice(itertools.cycle((236, 17)), room - len(words))
    short, longer = divmod(room, blocks)
    parts, at = [], 0
    for n in range(blocks):
        end = at + short + (n >= blocks - longer)
        parts.append(words[at:end])
        at = end
    woven = [part[n] for n in range(short + 1) for part in parts if n < len(part)]
    return woven + [word for column in zip(*(_qr_check(part, check) for part in parts)) for word in column]


def _qr_times(a: int, b: int) -> int:
    """The product in GF(256)."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = a << 1 ^ (a >> 7) * 0x11D, b >> 1
    return product


def _qr_check(data: list[int], count: int) -> list[int]:
    """Reed-Solomon: what is left when the data are divided by the generator of that many roots."""
    divisor, root = [1], 1
    for _ in range(count):
        divisor = [a ^ _qr_times(b, root) for a, b in zip(divisor + [0], [0] + divisor)]
        root = _qr_times(root, 2)
    rest = data + [0] * count
    for n in range(len(data)):
        factor = rest[n]
        for m, value in enumerate(divisor):
            rest[n + m] ^= _qr_times(value, factor)
    return rest[len(data):]


def format_qr(grid: list[list[bool]]) -> str:
    """The code for a terminal, two rows a line, white on black (ECMA-48 s8.3.117), with its margin."""
    width = len(grid) + 8
    rows = [[False] * width] * 4 + [[False] * 4 + row + [False] * 4 for row in grid] + [[False] * width] * 5
    return "\n".join("\x1b[40;97m%s\x1b[0m" % "".join(" \u2584\u2580\u2588"[2 * (not above) + (not below)]
                                                      for above, below in zip(*rows[n:n + 2])) for n in range(0, len(grid) + 8, 2))


# ---- what kind of file is it?

_MAGIC = (  # (offset, bytes, media type): enough to believe the name (W1)
    (0, b"\x89PNG\r\n\x1a\n", "image/png"), (0, b"\xff\xd8\xff", "image/jpeg"), (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"), (8, b"WEBP", "image/webp"), (4, b"ftypavif", "image/avif"),
    (0, b"ID3", "audio/mpeg"), (0, b"\xff\xfb", "audio/mpeg"), (0, b"\xff\xf3", "audio/mpeg"),
    (0, b"fLaC", "audio/flac"), (0, b"OggS", "audio/ogg"), (8, b"WAVE", "audio/wav"), (4, b"ftypM4A", "audio/mp4"),
    (4, b"ftyp", "video/mp4"), (0, b"\x1aE\xdf\xa3", "video/webm"))
_MEDIA = mimetypes.MimeTypes()   # the module's own table, not the system's: every machine says the same
_MEDIA.encodings_map = {}        # a.gz is a gzip file, not an encoded something
for _media, _suffixes in {
        "image/webp": "webp", "image/avif": "avif", "image/heic": "heic heif", "audio/flac": "flac", "audio/mp4": "m4a",
        "audio/ogg": "ogg oga opus", "audio/wav": "wav", "video/mp4": "m4v", "video/webm": "webm",
        "video/x-matroska": "mkv", "text/markdown": "md markdown", "text/javascript": "js mjs", "text/csv": "csv",
        "text/plain": "log ini conf env cfg properties lock srt rst diff patch gitignore editorconfig nfo bat ps1 cmd "
                      "ts tsx jsx vue svelte kt swift php pl lua r go rs rb java scala cs cc cpp hpp h c m dart",
        "text/vtt": "vtt", "text/calendar": "ics", "text/vcard": "vcf", "message/rfc822": "eml",
        "application/json": "json ipynb", "application/sql": "sql", "application/yaml": "yaml yml", "application/toml": "toml",
        "application/xml": "xml xsl", "application/gzip": "gz tgz", "application/zstd": "zst", "application/x-bzip2": "bz2",
        "application/x-xz": "xz", "application/rtf": "rtf", "audio/aac": "aac", "video/ogg": "ogv", "image/bmp": "bmp",
        "application/vnd.oasis.opendocument.presentation": "odp",
        "application/x-7z-compressed": "7z", "application/vnd.rar": "rar", "application/epub+zip": "epub",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
        "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx",
        "application/vnd.oasis.opendocument.text": "odt", "application/vnd.oasis.opendocument.spreadsheet": "ods"}.items():
    for _suffix in _suffixes.split():
        _MEDIA.add_type(_media, "." + _suffix)
_PLAIN_NAMES = frozenset("makefile dockerfile license licence readme changelog authors copying todo".split())
INLINE_MEDIA = frozenset(media for _, _, media in _MAGIC)        # a browser may show these from our origin


@lru_cache(maxsize=512)
def media_of_suffix(suffix: str) -> str:
    """The media type a suffix claims; "" if it claims none."""
    return _MEDIA.guess_type("x." + suffix)[0] or ""


def media_of_name(name: str) -> str:
    """The media type a name claims by its suffix or, like Makefile, as a whole; "" if it claims none."""
    stem, dot, suffix = name.lower().rpartition(".")
    return media_of_suffix(suffix) if dot else "text/plain" if suffix in _PLAIN_NAMES else ""


KINDS = {  # what people call it: media types, or the part of them before the slash
    "image": "image", "video": "video", "audio": "audio", "pdf": "application/pdf",
    "table": "text/csv text/tab-separated-values application/vnd.ms-excel application/vnd.oasis.opendocument.spreadsheet "
             "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "document": "application/msword application/rtf application/epub+zip application/vnd.ms-powerpoint "
                "application/vnd.oasis.opendocument.text application/vnd.oasis.opendocument.presentation "
                "application/vnd.openxmlformats-officedocument.wordprocessingml.document "
                "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    "archive": "application/zip application/gzip application/zstd application/x-tar application/x-7z-compressed "
               "application/vnd.rar application/x-bzip2 application/x-xz application/java-archive",
    "text": "text message application/json application/xml application/yaml application/toml application/javascript application/sql "
            "application/x-sh application/x-tex application/x-latex application/x-csh application/x-python"}
_KIND_OF = {media: kind for kind, medias in KINDS.items() for media in medias.split()}


def kind_of_media(media: str | None) -> str:
    """The kind of a file: one of KINDS, or "other"; "collection" for None."""
    if media is None:
        return "collection"
    return _KIND_OF.get(media) or _KIND_OF.get(media.partition("/")[0], "other")


def kind_of_file(name: str, media: str | None) -> str:
    """The kind of a file by its media type; by its name where that says nothing, unless only its bytes could prove it."""
    kind, claimed = kind_of_media(media), media_of_name(name)
    return kind_of_media(claimed) if kind == "other" and claimed and claimed not in INLINE_MEDIA else kind


def decode_text(data: bytes) -> str | None:
    """The text of a file: UTF-8, UTF-16 with its mark, or else Windows-1252; None if it is none."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


_WORD = re.compile(r'(-?)(?:"([^"]*)"|(\S+))')
WORDS_MOST = 8


def parse_words(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a person typed, `lake "two words" -winter`, to (words that must be there, words that must not), folded."""
    found = [(sign, (quoted or plain or "").casefold()) for sign, quoted, plain in _WORD.findall(key_of(text))]
    return (tuple(word for sign, word in found if word and not sign)[:WORDS_MOST],
            tuple(word for sign, word in found if word and sign)[:WORDS_MOST])


_NO_BLANKS = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")


def spread(text: str) -> str:
    """A text as it is indexed: folded; signs of writing that has no blanks between words stand each for itself."""
    return _NO_BLANKS.sub(r" \1 ", text.casefold())


def find_words(text: str, words: Sequence[str]) -> tuple[str, str, str] | None:
    """A place in a text where one of some words stands, on one line: (before, the word, after)."""
    found = re.search("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)), text, re.I)
    if not found:
        return None
    start, end = found.span()
    before = " ".join(text[max(0, start - 60):start].split())[-40:] + " " * text[max(0, start - 1):start].isspace()
    after = " " * text[end:end + 1].isspace() + " ".join(text[end:end + 200].split())[:120]
    return before, found[0], after


def media_of_picture(data: bytes) -> str | None:
    """The media type of a picture that every browser shows, by its first bytes."""
    return next((media for at, magic, media in _MAGIC if data.startswith(magic, at)
                 and media in ("image/webp", "image/jpeg", "image/png")), None)


def media_type(name: str, head: bytes) -> str:
    """The media type of a file, by its name; what a browser would show counts only if the first bytes agree."""
    claimed = media_of_name(name)
    if claimed and claimed not in INLINE_MEDIA:
        return claimed
    found = next((media for at, magic, media in _MAGIC if head.startswith(magic, at)), "")
    moving = {claimed.partition("/")[0], found.partition("/")[0]} <= {"audio", "video"}
    if claimed and claimed != found and not moving:
        return "application/octet-stream"
    return claimed or found or "application/octet-stream"


# ==== 4. Blobs ===========================================================================
#
# Chunks of bytes.  1. A chunk is named by the SHA-256 of its bytes and never changes.  2. The object that
# holds it is named HASH-RANDOM and the name is never used again, so a late delete cannot hit a new upload.
# 3. put() returns when file and directory entry survive a loss of power; only then may a row name the object.

EMPTY = hashlib.sha256(b"").hexdigest()
BUFFERS = 3                     # chunks in memory per upload: one arrives, two are hashed and written
VERIFIED_LIMIT = 20_000         # objects remembered as whole since the start


class StoredChunk(NamedTuple):
    """A chunk as its row tells it: inline bytes or the object that holds it."""
    hash: str
    size: int
    data: bytes | None
    object: str | None


class FileSlice(NamedTuple):
    """Bytes of an open file, for sendfile."""
    file: BinaryIO
    start: int
    count: int


@dataclass
class Stored:
    """Bytes that are durable and wait for a batch to refer to them."""
    manifest: str                                # the hash of its only chunk, or "m" and a hash over the list
    size: int
    sha256: str                                  # of all its bytes
    chunks: list[tuple[str, int]]                # (hash, size) in order
    tag: str = ""                                # its new objects are named HASH-TAG
    relied: Sequence[str] = ()                   # hashes of chunks that were there already, and must be when the batch is done
    inline: bytes | None = None                  # the bytes themselves, if they go into the chunk's row
    head: bytes = b""                            # the first bytes, to tell what it is
    digests: dict[str, str] = field(default_factory=dict)    # others that were asked for: {"sha1": hex}


def manifest_of(chunks: Sequence[tuple[str, int]]) -> str:
    """The name of the content made of these chunks: equal names mean equal bytes.

    A single chunk names its file.  Several are named by a hash over the list, marked "m" so that no
    chunk's bytes can pass for somebody's list.
    """
    if len(chunks) == 1:
        return chunks[0][0]
    whole = hashlib.sha256()
    for hash, size in chunks:
        whole.update(b"%s %d\n" % (hash.encode(), size))
    return "m" + whole.hexdigest()


# ---- files and directories that survive a loss of power

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}       # "this file system has no such call"
OURS = ("cloud.db", "cloud-version-", "objects", "serve.lock", "write.lock", "reserve",
        "lost+found")            # what names in a data directory begin with
SHARING_WAITS = (0.01, 0.05, 0.2, 0.5) if os.name == "nt" else ()      # seconds between tries while a scanner has a file open


def sync_file(fd: int) -> None:
    """Bring a file's bytes onto the medium; macOS wants to be told that it is meant (R5)."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:                 # SMB, NFS, some exFAT; any other error is one (R4)
            if error.errno not in UNSUPPORTED:
                raise
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system has a call for that, and we may open it."""
    if os.name == "nt":
        return
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        return                                   # a directory above ours
    try:
        sync_file(fd)
    except OSError as error:                     # some FUSE and CIFS
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def make_directory(path: Path, mode: int = 0o777) -> bool:
    """Make a directory, and those above it that are missing, durably; False if it was there.  raises OSError"""
    missing = list(itertools.takewhile(lambda place: not place.exists(), (path, *path.parents)))
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)
    return bool(missing)


def make_private_directory(path: Path) -> None:
    """Make a directory nobody else can read, or make one that is ours so (K2).  raises CloudError"""
    try:
        if not make_directory(path, 0o700) and os.name != "nt" and path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise CloudError("storage-failed", "cannot use the data directory %s: %s" % (path, error.strerror)) from error
    if not os.access(path, os.W_OK | os.X_OK):
        who = " by uid %d; it belongs to uid %d" % (os.getuid(), path.stat().st_uid) if hasattr(os, "getuid") else ""
        raise CloudError("read-only", "the data directory %s cannot be written%s" % (path, who))


def claim_directory(path: Path) -> None:
    """make_private_directory for a path that somebody typed.  raises CloudError

    A directory that we neither made nor recognise is never changed or filled: a wrong word on the command line
    must not lock others out of theirs.
    """
    try:
        names = os.listdir(path) if path.exists() else []
        shared = path.exists() and path.stat().st_mode & 0o1000          # the sticky bit, as of /tmp
    except OSError as error:
        raise CloudError("storage-failed", "cannot use the data directory %s: %s" % (path, error.strerror)) from error
    if "cloud.db" not in names and (shared or not all(name.startswith(OURS) for name in names)):
        raise CloudError("conflict", "%s is not a directory of cloudserver's and %s; name a new one, like %s" % (
            path, "open to everybody" if shared else "holds something else", path / "cloud-data"))
    make_private_directory(path)


def give_to_owner(fd: int, home: Path) -> None:
    """A file that root makes in somebody's directory becomes that somebody's, as SQLite does with its own."""
    if hasattr(os, "geteuid") and not os.geteuid():
        about = home.stat()
        os.fchown(fd, about.st_uid, about.st_gid)


def insist(act: Callable[..., None], *places: Any) -> None:
    """os.unlink(place), os.replace(source, place): on Windows also while a scanner reads it, or if it is read-only.

    raises OSError, on Windows PermissionError after 0.8 s: another program has it open
    """
    for wait in SHARING_WAITS:
        try:
            return act(*places)
        except PermissionError:
            if os.path.exists(places[-1]) and not os.access(places[-1], os.W_OK):
                os.chmod(places[-1], 0o600)
            time.sleep(wait)
    return act(*places)


class ObjectDirectory:
    """A blob store of four verbs, put, get, delete and list, over a directory: objects/ab/abcd...-RANDOM.

    Names are made by the server alone, and no link is followed (P16).
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def create(self) -> None:
        """Make the directories, durably."""
        make_directory(self.home, 0o700)
        for shard in range(256):
            (self.home / ("%02x" % shard)).mkdir(mode=0o700, exist_ok=True)
        sync_directory(self.home)

    def _place(self, name: str) -> Path:
        """Where an object lies.  raises FileNotFoundError for what is no name of an object: nothing of that name is there"""
        if not _OBJECT.fullmatch(name):
            raise FileNotFoundError(errno.ENOENT, "not the name of an object", name)
        return self.home / name.lstrip(".")[:2] / name           # a file that is being written begins with a dot

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Store an object durably.  raises OSError; then nothing of that name is there."""
        place, temporary = self._place(name), self._place("." + name)
        with suppress(FileNotFoundError):                # a leftover of somebody who was killed
            insist(os.unlink, temporary)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_EXTRA, 0o600)
        try:
            try:
                give_to_owner(fd, place.parent)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view):]
                sync_file(fd)
            finally:
                os.close(fd)
            insist(os.replace, temporary, place)
        except BaseException:
            with suppress(OSError):
                insist(os.unlink, temporary)
            raise
        sync_directory(place.parent)

    def get(self, name: str) -> BinaryIO:
        """Open an object.  raises FileNotFoundError."""
        return open(os.open(self._place(name), os.O_RDONLY | O_EXTRA), "rb", buffering=0)

    def has(self, name: str) -> bool:
        try:
            return self._place(name).exists()
        except FileNotFoundError:
            return False

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone already is fine.  raises OSError, e.g. while another program has it open"""
        with suppress(FileNotFoundError):
            insist(os.unlink, self._place(name))

    def list(self, shard: str) -> Iterator[tuple[str, int, int]]:
        """(name, bytes, ms since 1970 of its last change) of each object in one of the shards 00 to ff."""
        with os.scandir(self.home / shard) as entries:
            for entry in entries:
                if not _OBJECT.fullmatch(entry.name):
                    continue                             # not ours
                about = entry.stat(follow_symlinks=False)
                yield entry.name, about.st_size, about.st_mtime_ns // 1_000_000


_OBJECT = re.compile(r"\.?[0-9a-f]{64}-[0-9a-f]{1,32}")
O_EXTRA = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Body:
    """Bytes on their way in.  The base class serves them from memory; HTTP reads them from a socket."""

    def __init__(self, data: bytes = b"") -> None:
        self.length: int | None = len(data)      # None if not known beforehand
        self._rest = memoryview(data)

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of `buffer`; 0 at the end.  raises CloudError if the rest will never come."""
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def wait_if_small(self, limit: int) -> None:
        """See that all of it is there, if it is small; in memory it is."""

    def insist(self, limit: int) -> None:
        """See that all of it is there."""

    def skip(self) -> bool:
        return True

    def drain(self) -> bool:
        return True

    def read(self, limit: int) -> bytes:
        """All of it.  raises CloudError too-large beyond `limit` bytes."""
        if self.length is not None and self.length > limit:
            raise CloudError("too-large", "the body may have %d bytes" % limit)
        buffer = bytearray(limit + 1 if self.length is None else self.length)
        count = fill(self, memoryview(buffer))
        if count > limit:
            raise CloudError("too-large", "the body may have %d bytes" % limit)
        return bytes(buffer[:count])


class FileBody(Body):
    """The bytes of an open file."""

    def __init__(self, file: BinaryIO, length: int | None = None) -> None:
        self.length, self._file = length, file

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer) or 0


def fill_what_comes(body: Body, view: memoryview) -> tuple[int, CloudError | None]:
    """As fill, but a body that breaks off gives what came of it, and the error."""
    count = 0
    try:
        while count < len(view):
            more = body.readinto(view[count:])
            if not more:
                break
            count += more
    except CloudError as error:
        return count, error
    return count, None


def fill(body: Body, view: memoryview) -> int:
    """Read until `view` is full or the body ends; returns the bytes read."""
    count = 0
    while count < len(view):
        more = body.readinto(view[count:])
        if not more:
            break
        count += more
    return count


class _RawBody(io.RawIOBase):
    """A Body with the face of a raw file."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._body.readinto(memoryview(buffer))


class FrameReader:
    """A body that is a line of JSON, or none, and then frames: length (4 bytes, big endian), bytes."""

    def __init__(self, body: Body) -> None:
        self._file = io.BufferedReader(_RawBody(body), 256 * KiB)

    def line(self, limit: int) -> bytes:
        """The first line.  raises CloudError too-large"""
        line = self._file.readline(limit + 1)
        if len(line) > limit:
            raise CloudError("too-large", "the first line may have %d bytes" % limit)
        return line

    def __iter__(self) -> Iterator[bytes]:
        """The bytes of each frame in turn.  raises CloudError bad-frame, too-large"""
        total = 0
        while True:
            head = self._file.read(4)
            if not head:
                return
            size = int.from_bytes(head, "big")
            if len(head) < 4 or not 0 < size <= CHUNK_LIMIT:
                raise CloudError("bad-frame", "a frame has 1 to %d bytes" % CHUNK_LIMIT)
            total += size
            if total > FRAMES_LIMIT:
                raise CloudError("too-large", "the frames of a request may have %d bytes" % FRAMES_LIMIT)
            data = self._file.read(size)
            if len(data) < size:
                raise CloudError("bad-frame", "the last frame is cut short")
            yield data


def format_frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


class Blobs:
    """Bytes to chunks and back, over one store; the lane is where hashing and writing happen beside receiving."""

    def __init__(self, store: ObjectDirectory) -> None:
        self.store = store
        self.lane = ThreadPoolExecutor(max_workers=4, thread_name_prefix="bytes")
        self._verified: dict[str, tuple[int, int]] = {}      # object: (size, mtime) when its hash was right

    def put(self, body: Body, known: Callable[[str], bool], digests: Iterable[str] = ()) -> Stored:
        """Cut a body into chunks and make them durable.

        known    tells of a hash whether the asking account refers to such a chunk already: those are not
                 written again; that somebody else has one must make no difference (D3)
        digests  names of further checksums to compute on the way: sha1, md5, sha3_256, adler32
        raises   CloudError as the body does, disk-full, storage-failed
        """
        size = body.length
        if size is not None and size <= INLINE_LIMIT:
            return self._inline(body.read(INLINE_LIMIT), digests)
        buffer = bytearray(CHUNK_SIZE if size is None or size > CHUNK_SIZE else size)
        count = fill(body, memoryview(buffer))
        if size is None and count <= INLINE_LIMIT:
            return self._inline(bytes(buffer[:count]), digests)
        return _Cutting(self, known, digests).run(body, buffer, count)

    def _inline(self, data: bytes, digests: Iterable[str]) -> Stored:
        hash = hashlib.sha256(data).hexdigest()
        sums = {name: hexdigest_of(name, data) for name in digests}
        return Stored(hash, len(data), hash, [(hash, len(data))], inline=data, head=data[:32], digests=sums)

    def put_chunk(self, hash: str, data: bytes | memoryview, tag: str) -> str:
        """Store one chunk as an object; returns its name.  raises CloudError"""
        name = "%s-%s" % (hash, tag)
        try:
            self.store.put(name, data)
        except OSError as error:
            raise storage_error(error) from error
        return name

    def open(self, chunk: StoredChunk) -> BinaryIO:
        """Open a chunk's object, its bytes checked once per start and after any change of the file (R25)."""
        try:
            file = self.store.get(chunk.object)
        except OSError as error:
            raise CloudError("storage-failed", "a part of the file cannot be read") from error
        about = os.fstat(file.fileno())
        seen = about.st_size, about.st_mtime_ns
        if self._verified.get(chunk.object) != seen:
            if hash_file(file) != chunk.hash:
                file.close()
                log.error("damaged chunk %s", chunk.hash)
                raise CloudError("storage-failed", "a part of the file is damaged")
            if len(self._verified) >= VERIFIED_LIMIT:
                self._verified.clear()
            self._verified[chunk.object] = seen
        return file

    def is_open(self, chunk: StoredChunk) -> bool:
        """Would open() return at once?"""
        return chunk.object in self._verified

    def slices(self, chunks: Iterator[tuple[StoredChunk, int, int]]) -> Iterator[bytes | FileSlice]:
        """Bytes to send for (chunk, start, stop) in turn; the next chunk is checked while one is sent."""
        ahead: deque[tuple[StoredChunk, int, int, Any]] = deque()

        def more() -> None:
            for chunk, start, stop in chunks:
                file = None
                if chunk.data is None:
                    file = self.open(chunk) if self.is_open(chunk) else self.lane.submit(self.open, chunk)
                ahead.append((chunk, start, stop, file))
                return

        try:
            more()
            while ahead:
                more()
                chunk, start, stop, file = ahead.popleft()
                if chunk.data is not None:
                    yield check_inline(chunk)[start:stop]
                    continue
                with (file.result() if isinstance(file, Future) else file) as opened:
                    yield FileSlice(opened, start, stop - start)
        finally:
            for *_, file in ahead:
                if isinstance(file, Future):
                    file.add_done_callback(lambda done: None if done.exception() else done.result().close())
                elif file is not None:
                    file.close()

    def read(self, chunk: StoredChunk) -> bytes:
        """All bytes of a chunk, checked."""
        return b"".join(read_slice(part) for part in self.slices(iter([(chunk, 0, chunk.size)])))


def check_inline(chunk: StoredChunk) -> bytes:
    """The bytes in a chunk's row.  raises CloudError if they are not what its name says"""
    if hashlib.sha256(chunk.data).hexdigest() != chunk.hash:
        log.error("damaged chunk %s", chunk.hash)
        raise CloudError("storage-failed", "a part of the file is damaged")
    return chunk.data


class Content:
    """The bytes of one version of a file, read in any range; nothing is opened before it is asked for."""

    def __init__(self, blobs: Blobs, size: int, only: StoredChunk | None = None,
                 more: Callable[[int], list[tuple[int, StoredChunk]]] | None = None) -> None:
        """
        only    the one chunk it consists of; or
        more    a function from an offset to some chunks in order, the first of which holds that byte
        """
        self.blobs, self.size, self.only, self.more = blobs, size, only, more

    def inline(self) -> bytes | None:
        """All bytes at once, if they lie in a row of the database.  raises CloudError if they are damaged"""
        return None if self.only is None or self.only.data is None else check_inline(self.only)

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[bytes | FileSlice]:
        """The bytes of [start, stop) in pieces to send.  raises CloudError if one is missing or damaged"""
        stop = self.size if stop is None else stop
        if self.only is not None and self.only.data is not None:
            return self.blobs.slices(iter([(self.only, start, stop)]) if start < stop else iter(()))
        return self.blobs.slices(self._chunks(start, stop))

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[StoredChunk, int, int]]:
        while start < stop:
            some = [(0, self.only)] if self.only is not None else self.more(start)
            for offset, chunk in some:
                if offset >= stop:
                    break
                if not offset <= start < offset + chunk.size:
                    raise CloudError("storage-failed", "a part of the file is missing")
                end = min(stop, offset + chunk.size)
                yield chunk, start - offset, end - offset
                start = end
            if not some:
                raise CloudError("storage-failed", "a part of the file is missing")

    def parts(self) -> Iterator[tuple[str, int]]:
        """(SHA-256, bytes) of each chunk in order, without opening any."""
        return ((chunk.hash, chunk.size) for chunk, _, _ in self._chunks(0, self.size))

    def read(self, limit: int) -> bytes:
        """The first bytes, at most `limit`."""
        return b"".join(read_slice(part) for part in self.slices(0, min(limit, self.size)))


class _Cutting:
    """One upload larger than a row: receives into one buffer while others are hashed and written in the lane."""

    def __init__(self, blobs: Blobs, known: Callable[[str], bool], digests: Iterable[str]) -> None:
        self.blobs, self.known, self.tag = blobs, known, secrets.token_hex(8)
        self.whole = hashlib.sha256()
        self.digests = {name: new_digest(name) for name in digests}
        self.chunks: list[tuple[str, int]] = []
        self.written: dict[str, object] = {}         # hash: whose it is to write
        self.relied: list[str] = []                  # hashes of what was there already
        self.flying: deque[tuple[Any, bytearray]] = deque()

    def run(self, body: Body, buffer: bytearray, count: int) -> Stored:
        """Take `count` bytes that are in `buffer`, then the rest of `body`."""
        step, arrived = LARGE_CHUNK if (body.length or 0) > LARGE_BODY else CHUNK_SIZE, 0
        head = bytes(buffer[:32])
        try:
            while count:
                view = memoryview(buffer)[:count]
                self.flying.append((self.blobs.lane.submit(self._write, view), buffer))
                for digest in (self.whole, *self.digests.values()):
                    digest.update(view)
                arrived += count
                if count < len(buffer) or body.length == arrived:
                    break
                buffer = self._land() if len(self.flying) >= BUFFERS - 1 else bytearray(step)
                count = fill(body, memoryview(buffer))
            while self.flying:
                self._land()
        finally:
            for future, _ in self.flying:              # after a failure: nobody may write into freed buffers
                future.cancel() or future.exception()
        size = sum(size for _, size in self.chunks)
        sums = {name: digest.hexdigest() for name, digest in self.digests.items()}
        return Stored(manifest_of(self.chunks), size, self.whole.hexdigest(), self.chunks, self.tag, self.relied, head=head,
                      digests=sums)

    def _land(self) -> bytearray:
        """Wait for the oldest chunk under way; returns its buffer for use again."""
        future, buffer = self.flying.popleft()
        self.chunks.append(future.result())
        return buffer

    def _write(self, view: memoryview) -> tuple[str, int]:
        hash = hashlib.sha256(view).hexdigest()
        mine = object()                          # the same bytes may be in several hands at once
        if self.written.setdefault(hash, mine) is mine:
            if self.known(hash):
                self.relied.append(hash)
            else:
                self.blobs.put_chunk(hash, view, self.tag)
        return hash, len(view)


class _Adler32:
    """zlib.adler32 with the face of a hash."""

    def __init__(self) -> None:
        self.value = 1

    def update(self, data: bytes | memoryview) -> None:
        self.value = zlib.adler32(data, self.value)

    def hexdigest(self) -> str:
        return "%08x" % self.value


def new_digest(name: str) -> Any:
    return _Adler32() if name == "adler32" else hashlib.new(name)


def hexdigest_of(name: str, data: bytes) -> str:
    digest = new_digest(name)
    digest.update(data)
    return digest.hexdigest()


def hash_file(file: BinaryIO) -> str:
    """SHA-256 of all of an open file, in memory that does not grow with it."""
    digest, buffer = hashlib.sha256(), bytearray(256 * KiB)
    file.seek(0)
    while True:
        count = file.readinto(buffer)
        if not count:
            return digest.hexdigest()
        digest.update(memoryview(buffer)[:count])


def read_slice(part: bytes | FileSlice) -> bytes:
    return part if isinstance(part, bytes) else b"".join(read_pieces(part, part.count))


def read_pieces(part: FileSlice, step: int = 256 * KiB) -> Iterator[bytes]:
    """The bytes of a slice, some at a time.  raises CloudError if the file is shorter"""
    part.file.seek(part.start)
    left = part.count
    while left:
        data = part.file.read(min(left, step))
        if not data:
            raise CloudError("storage-failed", "a part of the file is cut short")
        left -= len(data)
        yield data


def storage_error(error: OSError) -> CloudError:
    """Word a failure of the disk (R18-R20)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CloudError("disk-full", "the disk of the server is full")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return CloudError("read-only", "the data directory cannot be written")
    log.error("storage: %s", error)
    return CloudError("storage-failed", "the disk of the server fails")


# ==== 5. Database ========================================================================
#
# Two calls, read and write, and no open transaction ever spans a round trip: what holds for SQLite here can
# hold for a database behind a network.
#
# 1. A batch is guards, a journal line and a body.  Guards are SELECTs that return a reason where they fail.  Each
#    batch has a savepoint: one that is refused, by whatever and whenever, leaves nothing and takes nobody with it.
# 2. Every batch with a journal line draws the next seq; inside its body (SELECT max(seq) FROM journal) is that seq.
#    Its line has a random tag: two databases with the same tag at a seq have the same past up to there, others have not.
# 3. The caller who finds no commit under way commits for all who wait: one BEGIN, one fsync, then all are answered.
#    No body reads the database on its way: the connection that writes is the only one at work.
# 4. Between processes a lock file queues commits, and checkpoints happen inside commits: the two never overlap.
# 5. Ids and times come from the process as parameters, never from the database.

SCHEMA = """
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE op (                       -- batches whose id a client chose: repeating one changes nothing
    id TEXT PRIMARY KEY, seq INTEGER, digest TEXT NOT NULL, result TEXT, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE journal (                  -- one row per batch that changes a tree or an account
    seq INTEGER PRIMARY KEY, at INTEGER NOT NULL,
    home INTEGER NOT NULL, account INTEGER NOT NULL, device TEXT NOT NULL, action TEXT NOT NULL, detail TEXT NOT NULL);
CREATE INDEX journal_home ON journal (home, seq);
CREATE TABLE account (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, key TEXT UNIQUE, root INTEGER NOT NULL, admin INTEGER NOT NULL,
    quota INTEGER,                      -- bytes; NULL is none
    password TEXT NOT NULL, created INTEGER NOT NULL,
    removed INTEGER,                    -- due time of its end; key is NULL then
    shape INTEGER NOT NULL DEFAULT 0);  -- raised when collections leave their places or locks appear: see Spot
CREATE TABLE entry (                    -- the temporal tree: what a node was during [since, until)
    home INTEGER NOT NULL, since INTEGER NOT NULL, node INTEGER NOT NULL, until INTEGER,
    parent INTEGER, name TEXT NOT NULL, key TEXT NOT NULL, kind INTEGER NOT NULL,
    manifest TEXT, size INTEGER NOT NULL, mtime INTEGER NOT NULL, media TEXT, rev INTEGER NOT NULL,
    fate TEXT,                          -- why it ended: replaced, moved, deleted; purged: deleted for good, to be swept
    PRIMARY KEY (home, since, node)) WITHOUT ROWID;
CREATE UNIQUE INDEX entry_name ON entry (parent, key) WHERE until IS NULL;
CREATE UNIQUE INDEX entry_node ON entry (node) WHERE until IS NULL;
CREATE INDEX entry_past ON entry (node, since) WHERE until IS NOT NULL;
CREATE INDEX entry_past_parent ON entry (parent, until) WHERE until IS NOT NULL;
CREATE INDEX entry_until ON entry (home, until) WHERE until IS NOT NULL;
CREATE INDEX entry_deleted ON entry (home, until) WHERE fate = 'deleted';
CREATE INDEX entry_purged ON entry (node) WHERE fate = 'purged';
CREATE INDEX entry_manifest ON entry (manifest) WHERE manifest IS NOT NULL;
CREATE TABLE collection (               -- sums over the live tree below; kept by every batch
    node INTEGER PRIMARY KEY, seq INTEGER NOT NULL, size INTEGER NOT NULL, files INTEGER NOT NULL);
CREATE TABLE manifest (                 -- content of more than one chunk
    id TEXT PRIMARY KEY, size INTEGER NOT NULL, sha256 TEXT) WITHOUT ROWID;
CREATE TABLE manifest_chunk (manifest TEXT NOT NULL, offset INTEGER NOT NULL, chunk TEXT NOT NULL,
    PRIMARY KEY (manifest, offset)) WITHOUT ROWID;
CREATE INDEX manifest_chunk_chunk ON manifest_chunk (chunk);
CREATE TABLE digest (manifest TEXT NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (manifest, kind)) WITHOUT ROWID;
CREATE TABLE chunk (
    hash TEXT PRIMARY KEY, size INTEGER NOT NULL,
    object TEXT,                        -- or its bytes in data
    at INTEGER NOT NULL,                -- due time of its arrival
    condemned INTEGER,                  -- due time at which the sweep found nobody referring to it
    bad INTEGER,                        -- wall time at which its bytes were found damaged
    data BLOB);
CREATE INDEX chunk_condemned ON chunk (condemned) WHERE condemned IS NOT NULL;
CREATE INDEX chunk_bad ON chunk (bad) WHERE bad IS NOT NULL;
CREATE TABLE grave (object TEXT PRIMARY KEY, due INTEGER NOT NULL) WITHOUT ROWID;    -- objects to delete then
CREATE TABLE property (node INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (node, name)) WITHOUT ROWID;                                         -- dead properties, RFC 4918 s4
CREATE INDEX property_name ON property (name);
CREATE TABLE pin (node INTEGER NOT NULL, rev INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (node, rev)) WITHOUT ROWID;                                          -- versions that stay
CREATE TABLE age (due INTEGER PRIMARY KEY, seq INTEGER NOT NULL);                    -- the newest seq, every hour
CREATE TABLE name_row (id INTEGER PRIMARY KEY, node INTEGER NOT NULL);               -- rows of name_index
CREATE TABLE lock (token TEXT PRIMARY KEY, home INTEGER NOT NULL, node INTEGER NOT NULL, account INTEGER NOT NULL,
    deep INTEGER NOT NULL, exclusive INTEGER NOT NULL, owner TEXT NOT NULL, seconds INTEGER NOT NULL,
    due INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX lock_home ON lock (home);
CREATE TABLE upload (                   -- resumable uploads under way
    id TEXT PRIMARY KEY, home INTEGER NOT NULL, account INTEGER NOT NULL, root INTEGER NOT NULL,
    path TEXT,                          -- NULL: numbered parts, whose place is named at the end
    given TEXT NOT NULL, size INTEGER, mtime INTEGER, note TEXT NOT NULL,
    received INTEGER NOT NULL, created INTEGER NOT NULL, due INTEGER NOT NULL, done TEXT) WITHOUT ROWID;
CREATE INDEX upload_home ON upload (home) WHERE done IS NULL;
CREATE TABLE upload_chunk (upload TEXT NOT NULL, part INTEGER NOT NULL, offset INTEGER NOT NULL, chunk TEXT NOT NULL,
    size INTEGER NOT NULL, PRIMARY KEY (upload, part, offset)) WITHOUT ROWID;        -- offset in the part
CREATE INDEX upload_chunk_chunk ON upload_chunk (chunk);
CREATE TABLE loose (                    -- chunks an account sent ahead of the commit that will name them
    home INTEGER NOT NULL, chunk TEXT NOT NULL, size INTEGER NOT NULL, due INTEGER NOT NULL,
    PRIMARY KEY (home, chunk)) WITHOUT ROWID;
CREATE TABLE brake (                    -- what a device destroyed of late
    device TEXT PRIMARY KEY, home INTEGER NOT NULL,
    seq INTEGER NOT NULL,               -- the newest before its window began
    due INTEGER NOT NULL,               -- the window ends then
    files INTEGER NOT NULL,             -- live files of the account when it began
    deletes INTEGER NOT NULL, overwrites INTEGER NOT NULL,
    held INTEGER,                       -- wall time since when it is held
    free INTEGER NOT NULL) WITHOUT ROWID;        -- due time until which somebody allowed it everything
CREATE TABLE device (                   -- sessions of the page and app passwords
    id TEXT PRIMARY KEY, account INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    secret TEXT NOT NULL UNIQUE,        -- SHA-256 of the cookie or token
    readonly INTEGER NOT NULL, node INTEGER,     -- the collection it is limited to
    created INTEGER NOT NULL, used INTEGER, address TEXT NOT NULL,
    confirmed INTEGER NOT NULL,         -- due time until which the password counts as just given
    idle INTEGER, due INTEGER) WITHOUT ROWID;    -- due times of its end if unused, and at the latest
CREATE INDEX device_account ON device (account);
CREATE TABLE pairing (                  -- devices that wait to be let in by a browser
    token TEXT PRIMARY KEY, poll TEXT NOT NULL UNIQUE,       -- SHA-256 of what the browser and the device know
    device TEXT NOT NULL, address TEXT NOT NULL,
    account INTEGER,                    -- who let it in
    due INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE throttle (subject TEXT PRIMARY KEY, failures INTEGER NOT NULL, due INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE lease (name TEXT PRIMARY KEY, owner TEXT NOT NULL, fence INTEGER NOT NULL, due INTEGER NOT NULL) WITHOUT ROWID;
"""

VERSION_2 = """
CREATE TABLE text_row (                 -- rows of text_index: contents of text files, each once per account
    id INTEGER PRIMARY KEY, home INTEGER NOT NULL, manifest TEXT NOT NULL, UNIQUE (home, manifest));
CREATE TABLE thumbnail (                -- small pictures of images and videos, made by browsers
    id INTEGER PRIMARY KEY, home INTEGER NOT NULL, manifest TEXT NOT NULL, data BLOB NOT NULL, UNIQUE (home, manifest));
CREATE TABLE kept (                     -- what a later request of the same account will refer to
    id TEXT PRIMARY KEY, account INTEGER NOT NULL, value TEXT NOT NULL, due INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX kept_account ON kept (account);
CREATE INDEX journal_server ON journal (seq) WHERE action IN
    ('account-add', 'account-password', 'account-admin', 'account-quota', 'account-remove', 'settings', 'hold');
"""
VERSION_3 = """
ALTER TABLE journal ADD COLUMN tag TEXT NOT NULL DEFAULT '';        -- random: no other history has this seq with this tag
"""
VERSION_4 = """
ALTER TABLE account ADD COLUMN fed INTEGER NOT NULL DEFAULT 0;     -- what is gone since an older seq is not known any more
ALTER TABLE loose ADD COLUMN root INTEGER NOT NULL DEFAULT 0;      -- the collection that whoever sent it is limited to
UPDATE entry SET fate = 'deleted' WHERE fate = 'purged' AND EXISTS (
    SELECT 1 FROM entry l WHERE l.node = entry.node AND l.until IS NULL);
"""
VERSION_5 = """
CREATE TABLE known_place (              -- networks from which an account's password or devices were good: judged apart from strangers
    account INTEGER NOT NULL, network TEXT NOT NULL, due INTEGER NOT NULL, PRIMARY KEY (account, network)) WITHOUT ROWID;
"""
VERSION_6 = """
CREATE TABLE growing (node INTEGER PRIMARY KEY, home INTEGER NOT NULL, due INTEGER NOT NULL);        -- tops of copies that are being written
"""
MIGRATIONS = [VERSION_2, VERSION_3, VERSION_4, VERSION_5, VERSION_6]         # MIGRATIONS[0] leads from version 1 to 2
INDEXES = (  # made where SQLite can: parts of names; words of contents
    "CREATE VIRTUAL TABLE IF NOT EXISTS name_index USING fts5 (name, content = '', tokenize = 'trigram')",
    "CREATE VIRTUAL TABLE IF NOT EXISTS text_index USING fts5 (home, body, content = '', "
    "tokenize = 'unicode61 remove_diacritics 2')")

GROUP_LIMIT = 64                # batches in one commit
ATTEMPTS = 50                   # times a batch may find that somebody was faster
PIECE = 500                     # rows that are asked for, or touched, at a time


def pieces(rows: Sequence[Any], size: int = PIECE) -> Iterator[list[Any]]:
    return (list(rows[at:at + size]) for at in range(0, len(rows), size))


def marks(rows: Sequence[Any]) -> str:
    """A parameter for each: "?, ?, ?"."""
    return ", ".join("?" * len(rows))


class Clock:
    """Two times.  wall() is shown to people and may jump; due() only ever runs forward at the pace of seconds.

    What expires, is retained or swept goes by due(): a clock set ten years ahead ends nothing early, one
    set back locks out nobody (R17).  due() continues from where the database says the last process
    stopped, plus what the wall clock says has passed since, up to a day.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._offset = int(wall() * 1000) - int(steady() * 1000)

    def wall(self) -> int:
        return int(self._wall() * 1000)

    def due(self) -> int:
        return int(self._steady() * 1000) + self._offset

    def resume(self, due: int, wall: int) -> None:
        """Continue after a process that last stood at `due` when the wall clock said `wall`."""
        passed = max(0, min(DAY, self.wall() - wall))
        self._offset = due + passed - int(self._steady() * 1000)


HELD = (errno.EACCES, errno.EDEADLK, 0)         # how Windows says that somebody else has a lock; 0 is Wine's


class FileLock:
    """An exclusive lock on a file, between processes; the kernel lets go when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | O_EXTRA, 0o600)
        give_to_owner(self._fd, path.parent)

    def acquire(self, *, wait: bool = True) -> bool:
        if fcntl is None:
            return self._acquire_windows(wait)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        if fcntl is None:
            os.lseek(self._fd, 0, os.SEEK_SET)
            msvcrt.locking(self._fd, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _acquire_windows(self, wait: bool) -> bool:
        while True:
            try:
                os.lseek(self._fd, 0, os.SEEK_SET)
                msvcrt.locking(self._fd, msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if error.errno not in HELD:
                    raise
                if not wait:
                    return False
                time.sleep(0.005)

    def close(self) -> None:
        os.close(self._fd)


class Statement(NamedTuple):
    """One statement of a batch; with `many` its parameters are an iterable of rows."""
    sql: str
    params: Any = ()
    many: bool = False


class Line(NamedTuple):
    """What a batch leaves in the journal."""
    home: int
    who: Principal
    action: str
    detail: dict[str, Any]


@dataclass
class Batch:
    """Everything one write does, decided beforehand."""
    body: list[Statement]
    guards: list[Statement] = field(default_factory=list)
    line: Line | None = None                     # None: no change of a tree, no seq is drawn
    op: tuple[str, str] | None = None            # (id a client chose, digest of what it asked)
    result: str | None = None                    # what to answer if the client asks again
    changes: Sequence[Change] = ()               # what its body does to the tree, for who asked
    frees: bool = False                          # it gives room back: on a full disk the reserve makes it possible
    seq: int = 0                                 # set when it is committed,
    tag: str = ""                                # with this


class _Ticket:
    """A batch in the queue and, in the end, what became of it."""
    __slots__ = ("batch", "settled", "error")

    def __init__(self, batch: Batch) -> None:
        self.batch, self.settled, self.error = batch, False, None


SETTINGS = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA fullfsync = 1", "PRAGMA checkpoint_fullfsync = 1",
            "PRAGMA journal_size_limit = %d" % (64 * MiB))


class Database:
    """SQLite with write-ahead log.  `read` and `write` may be called from any thread."""

    def __init__(self, path: Path, clock: Clock, *, readonly: bool = False) -> None:
        """Open, making or migrating the file if need be.  raises CloudError, OSError

        readonly   change nothing, not even on the way: a disk that turned read-only, a mounted snapshot
        """
        self.path, self.clock, self.readonly = path, clock, readonly
        self.reserve = Reserve(path.parent / "reserve")
        self._address, self._copy = str(path), None          # _copy: where a log that cannot be read in place is read
        self._idle: deque[sqlite3.Connection] = deque()      # connections for reading
        self._queue: deque[_Ticket] = deque()
        self._turn = threading.Condition()                   # of the queue, and of _committing
        self._committing = False
        self.broken = ""                                    # why nothing is written any more (R4)
        self._index: bool | None = None                      # is there an index of names?
        self._last_id, self._drawing = 0, threading.Lock()
        self._slot = secrets.randbelow(4096)
        try:
            self._open_to_read() if readonly else self._open_to_write()
        except sqlite3.DatabaseError as error:
            raise database_error(error, path) from error
        self._resume_clock()

    def _open_to_write(self) -> None:
        self._lock = FileLock(self.path.parent / "write.lock")
        with self._locked():
            try:
                self._writer = self._connect(writes=True)
            except sqlite3.OperationalError:
                if not self.reserve.give_up():               # a full disk has no room for the log's index (R18)
                    raise
                self._writer = self._connect(writes=True)
            self._migrate(self._writer)

    def _open_to_read(self) -> None:
        """As the file stands, with what its log holds; where that cannot be read in place, by a copy of both."""
        log_file = self.path.with_name(self.path.name + "-wal")
        here = self.path.resolve().as_uri()
        self._address = here + "?mode=ro"
        try:
            self._idle.append(self._connect())
        except sqlite3.OperationalError:
            if log_file.exists() and log_file.stat().st_size:
                self._copy = tempfile.TemporaryDirectory()
                for file in (self.path, log_file):
                    shutil.copyfile(file, Path(self._copy.name) / file.name)
                self._address = (Path(self._copy.name) / self.path.name).as_uri()
            else:
                self._address = here + "?immutable=1"
            self._idle.append(self._connect())
        (version,), = self.read("PRAGMA user_version")
        if version != 1 + len(MIGRATIONS):
            raise CloudError("conflict", "the data was written by another version of this program; start the server on it once, or use that one")

    # ---- reading

    def read(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one SELECT, as of the last commit.  raises CloudError"""
        db = self._reader()
        try:
            return db.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        finally:
            self._idle.append(db)

    @contextmanager
    def snapshot(self) -> Iterator[Callable[..., Iterator[tuple[Any, ...]]]]:
        """Several SELECTs that see the same commit: with db.snapshot() as read: for row in read(sql, params)."""
        db = self._reader()
        try:
            db.execute("BEGIN")
            yield lambda sql, params=(): db.execute(sql, params)
        except sqlite3.Error as error:
            raise self._failed(error) from error
        finally:
            self._give_back(db)

    def _failed(self, error: sqlite3.Error) -> CloudError:
        """Word a failure; a file that is found damaged is not written any more: what is acknowledged must be kept (R4)."""
        refusal = database_error(error)
        if refusal.kind == "storage-failed" and "damaged" in str(refusal):
            self.broken = self.broken or str(refusal)
        return refusal

    def _reader(self) -> sqlite3.Connection:
        """An idle connection for reading, or one more.  raises CloudError, for the one request that wanted it"""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise database_error(error) from error

    def _give_back(self, db: sqlite3.Connection) -> None:
        if db.in_transaction:
            db.rollback()                        # it read: there is nothing to lose
        self._idle.append(db)

    def each(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of one SELECT as they are asked for, all of one moment; not to be held longer than needed."""
        with self.snapshot() as read:
            yield from read(sql, params)

    # ---- writing

    def write(self, attempt: Callable[[], Batch]) -> Batch:
        """Commit what `attempt` decides; returns the batch with its seq.

        attempt   reads, decides and returns a batch whose guards restate what it relied on; it is called
                  again when a guard finds that somebody was faster
        raises    what attempt raises; CloudError busy, disk-full, read-only, storage-failed
        """
        if self.readonly:
            raise CloudError("read-only", "the data is open for reading only")
        for count in range(ATTEMPTS):
            batch = attempt()
            try:
                self._commit(batch)
                return batch
            except Conflict:
                if count > 2:
                    time.sleep(secrets.randbelow(count) / 1000)
        raise CloudError("busy", "too many writers at one place", retry_after=1)

    def write_once(self, batch: Batch, refusal: CloudError) -> None:
        """Commit a batch that cannot be decided anew.  raises `refusal` if a guard does not hold, and as write"""
        if self.readonly:
            raise CloudError("read-only", "the data is open for reading only")
        try:
            self._commit(batch)
        except Conflict:
            raise refusal from None

    def run(self, *body: Statement, frees: bool = False) -> None:
        """Commit statements that rely on nothing and change no tree."""
        self.write(lambda: Batch(list(body), frees=frees))

    def new_id(self) -> int:
        """A number for a node: microseconds since 2020, and a slot that differs between processes.

        Ids of one process rise, so that rows which are made together lie together.
        """
        return self.new_ids(1)

    def new_ids(self, count: int) -> int:
        """The first of `count` numbers, each 4096 more than the one before."""
        with self._drawing:
            first = max((self.clock.wall() - ID_EPOCH) * 1000, self._last_id + 1)
            self._last_id = first + count - 1
        return first << 12 | self._slot

    def has_index(self) -> bool:
        """Are there indexes of names and contents?  They are made on the first call, where SQLite can (FTS5, trigrams)."""
        if self._index is None:
            try:
                self.run(*map(Statement, INDEXES))
                self._index = True
            except CloudError:
                self._index = False
        return self._index

    def lease(self, name: str, owner: str, life: int) -> int | None:
        """Take or renew a lease for `life` ms; returns its fence, or None while somebody else holds it.

        The fence rises with every new holder; a job's batches guard that it is still theirs.
        """
        def attempt() -> Batch:
            now = self.clock.due()
            rows = self.read("SELECT owner, fence, due FROM lease WHERE name = ?", (name,))
            holder, fence, due = rows[0] if rows else ("", 0, 0)
            if holder != owner and due > now:
                raise Conflict
            return Batch([Statement("INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?)",
                                    (name, owner, fence + (holder != owner), now + life))],
                         [Statement("SELECT 'lease' WHERE coalesce((SELECT fence FROM lease WHERE name = ?), 0) <> ?",
                                    (name, fence))])
        try:
            return self.write(attempt).body[0].params[2]
        except Conflict:
            return None

    def address(self) -> str:
        """What another connection of SQLite's opens or attaches this database by."""
        return self._address

    def release(self, name: str, owner: str) -> None:
        """Give a lease back, for the next one who asks; its fence still rises."""
        self.run(Statement("UPDATE lease SET due = 0 WHERE name = ? AND owner = ?", (name, owner)), frees=True)

    def setting(self, name: str) -> str | None:
        rows = self.read("SELECT value FROM setting WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def close(self) -> None:
        with self._turn:
            while self._committing:
                self._turn.wait()
        with nullcontext() if self.readonly else self._locked():
            for db in self._idle:
                db.close()
            if not self.readonly:
                self._writer.close()
        if not self.readonly:
            self._lock.close()
        if self._copy:
            self._copy.cleanup()

    # ---- committing (invariants 1 to 4)

    def _commit(self, batch: Batch) -> None:
        """Queue a batch and come back when it is settled, committing for all who wait if nobody else does (invariant 3)."""
        ticket = _Ticket(batch)
        with self._turn:
            self._queue.append(ticket)
        while not ticket.settled:
            with self._turn:
                while self._committing and not ticket.settled:
                    self._turn.wait()
                if ticket.settled:
                    break
                self._committing = True
            try:
                self._commit_group([self._queue.popleft() for _ in range(min(len(self._queue), GROUP_LIMIT))])
            finally:
                with self._turn:
                    self._committing = False
                    self._turn.notify_all()
        if ticket.error is not None:
            raise ticket.error

    def _commit_group(self, group: list[_Ticket]) -> None:
        """One transaction for all, and for those that give room back another one with the reserve's if the disk is full."""
        try:
            self._transact(group)
        except Exception as error:
            freeing = [ticket for ticket in group if ticket.batch.frees]
            for ticket in group:
                ticket.error = error
            if freeing and isinstance(error, CloudError) and error.kind == "disk-full" and self.reserve.give_up():
                for ticket in freeing:
                    ticket.error = None
                try:
                    self._transact(freeing)
                except Exception as again:
                    for ticket in freeing:
                        ticket.error = again
        for ticket in group:
            ticket.settled = True

    def _transact(self, group: list[_Ticket]) -> None:
        """Commit some batches; notes the errors of those that are refused.  raises what takes them all"""
        if self.broken:
            raise CloudError("storage-failed", self.broken)
        db = self._writer
        with self._locked():
            try:
                db.execute("BEGIN IMMEDIATE")
                for ticket in group:
                    ticket.error = self._try(db, ticket.batch)
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if not isinstance(error, sqlite3.Error):
                    raise
                refusal = database_error(error)
                if refusal.kind == "storage-failed":
                    self.broken = "a write failed; the server must be restarted and verified"
                raise refusal from error

    def _try(self, db: sqlite3.Connection, batch: Batch) -> Exception | None:
        """Apply a batch within the transaction, or leave no trace of it and return why (invariant 1)."""
        db.execute("SAVEPOINT batch")
        try:
            self._apply(db, batch)
            refusal = None
        except _Failed as failed:
            refusal = Conflict(str(failed))
        except sqlite3.IntegrityError as error:              # a unique index guards, too
            refusal = Conflict(str(error))
        except Exception as error:
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, FAULTS):
                raise                                        # of the disk or the file: it takes the whole group
            refusal = error
        if refusal is not None:
            db.execute("ROLLBACK TO batch")
        db.execute("RELEASE batch")
        return refusal

    def _apply(self, db: sqlite3.Connection, batch: Batch) -> None:
        """raises _Failed, CloudError, sqlite3.Error, and what its rows raise"""
        if batch.op:
            for seq, digest in db.execute("SELECT seq, digest FROM op WHERE id = ?", batch.op[:1]):
                raise Replayed(seq, digest == batch.op[1])
        for guard in batch.guards:
            for (reason,) in db.execute(guard.sql, guard.params):
                if reason is not None:
                    raise _Failed(reason)
        if batch.line:
            home, who, action, detail = batch.line
            batch.tag = secrets.token_hex(8)
            batch.seq = db.execute(
                "INSERT INTO journal (seq, at, home, account, device, action, detail, tag) "
                "SELECT max(seq) + 1, ?, ?, ?, ?, ?, ?, ? FROM journal",
                (self.clock.wall(), home, who.account, who.device, action,
                 json.dumps(detail, ensure_ascii=False), batch.tag)).lastrowid
        for sql, params, many in batch.body:
            (db.executemany if many else db.execute)(sql, params)
        if batch.op:
            db.execute("INSERT INTO op (id, seq, digest, result, at) VALUES (?, ?, ?, ?, ?)",
                       (batch.op[0], batch.seq, batch.op[1], batch.result, self.clock.due()))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    # ---- opening

    def _connect(self, writes: bool = False) -> sqlite3.Connection:
        db = sqlite3.connect(self._address, timeout=30, isolation_level=None, check_same_thread=False,
                             cached_statements=256, uri=self.readonly)
        try:
            if self.readonly:
                db.execute("SELECT 1 FROM sqlite_master")            # can it be read at all?
            for setting in () if self.readonly else SETTINGS:
                db.execute(setting)
            db.execute("PRAGMA mmap_size = 0")
            db.execute("PRAGMA wal_autocheckpoint = %d" % (1000 if writes else 0))
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring the file to SCHEMA, all steps or none (PRAGMA user_version is the version reached)."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        check_version(version)
        if 0 < version <= len(MIGRATIONS):
            self._copy_before_migration(db, version)
        if version <= len(MIGRATIONS):
            migrate(db, [SCHEMA, *MIGRATIONS, self._first_rows()] if version == 0 else steps_from(db, version))

    def _first_rows(self) -> str:
        return """INSERT INTO journal (seq, at, home, account, device, action, detail) VALUES (1, %d, 0, 0, '', 'create', '{}');
            INSERT INTO setting (name, value) VALUES ('epoch', '%s'), ('generation', '0')""" % (
            self.clock.wall(), secrets.token_hex(8))

    def _copy_before_migration(self, db: sqlite3.Connection, version: int) -> None:
        """Keep the database as the older program left it, to go back to (R31)."""
        copy = self.path.with_name("cloud-version-%d.db" % version)
        if not copy.exists():
            partial = copy.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            db.execute("VACUUM INTO ?", (str(partial),))
            os.replace(partial, copy)
            sync_directory(self.path.parent)

    def _resume_clock(self) -> None:
        stood = self.setting("clock")
        if stood:
            self.clock.resume(*json.loads(stood))

    def save_clock(self) -> None:
        """Note where due() stands; the janitor does so every minute."""
        self.run(Statement("INSERT OR REPLACE INTO setting VALUES ('clock', ?)",
                           (json.dumps([self.clock.due(), self.clock.wall()]),)), frees=True)


def check_version(version: int) -> None:
    """raises CloudError if a database of this version was written by a newer program"""
    if version > 1 + len(MIGRATIONS):
        raise CloudError("conflict", "the data was written by a newer version of this program; use that one")


def steps_from(db: sqlite3.Connection, version: int) -> list[str]:
    """What leads from a version to today's.  It begins with what gives the database the shape that its version promises.

    Before the first release that changed without its number.  What is missing is made, what is empty made anew.
    raises  CloudError for a table of another shape that has rows: nobody here knows what they mean
    """
    steps, anew = [], set()
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(";".join([SCHEMA, *MIGRATIONS[:version - 1]]))
        for kind, name, table, sql in model.execute("SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL "
                                                    "ORDER BY type DESC").fetchall():                   # tables, then their indexes
            there = db.execute("SELECT 1 FROM main.sqlite_master WHERE type = ? AND name = ?", (kind, name)).fetchone()
            if there and kind == "table" and columns_of(db, name) != columns_of(model, name):
                if db.execute('SELECT 1 FROM main."%s" LIMIT 1' % name).fetchone():
                    raise CloudError("conflict", "the table %s is not that of version %d; export with the program that made it" % (name, version))
                steps.append('DROP TABLE main."%s"' % name)
                anew.add(name)
            if not there or table in anew:
                steps.append(sql)
    return steps + MIGRATIONS[version - 1:]


def columns_of(db: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    """(name, type, may it not be NULL, place in the key) of each."""
    return [(*row[1:4], row[5]) for row in db.execute('PRAGMA main.table_info("%s")' % table)]


def migrate(db: sqlite3.Connection, steps: Sequence[str]) -> None:
    """Take steps of MIGRATIONS, the last one included, all or none."""
    try:
        db.executescript(";".join(["BEGIN IMMEDIATE", *steps, "PRAGMA user_version = %d" % (1 + len(MIGRATIONS)), "COMMIT"]))
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


class _Failed(Exception):
    """A guard did not hold."""


FAULTS = (sqlite3.ProgrammingError, sqlite3.DataError, sqlite3.NotSupportedError)        # of a statement, not of the disk


class Reserve:
    """A file that does nothing but take up room, for the moment when a full disk would keep the database from freeing some (R18)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, size: int) -> None:
        """Have it, as far as the disk has room for it; what it once gave up comes back so."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                missing = size - file.tell()
                while missing > 0:
                    missing -= file.write(os.urandom(min(missing, MiB)))       # no file system can store that in less
                os.fsync(file.fileno())
        except OSError as error:
            log.info("the reserve for a full disk is not whole: %s", error.strerror)

    def give_up(self) -> bool:
        """Give its room to the database; False if there is none to give."""
        try:
            with open(self.path, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.truncate(0)
                os.fsync(file.fileno())
        except OSError:
            return False
        return size > 0


class Replayed(CloudError):
    """A batch with this op id was committed before; `same` tells whether it asked for the same."""

    def __init__(self, seq: int, same: bool) -> None:
        super().__init__("op-reused", "this operation id was used for something else")
        self.seq, self.same = seq, same


def database_error(error: sqlite3.Error, path: Path | None = None) -> CloudError:
    """Word a failure of SQLite (R4, R18-R20)."""
    text = str(error)
    for words, kind, message in DATABASE_ERRORS:
        if any(word in text for word in words):
            if kind == "storage-failed":
                log.error("database: %s", text)
            return CloudError(kind, message, **({"retry_after": 1} if kind == "busy" else {}))
    log.error("database: %s", text)
    if isinstance(error, (sqlite3.ProgrammingError, sqlite3.IntegrityError)) or "no such" in text:
        return CloudError("internal")
    return CloudError("storage-failed", "the database of the server fails" if path is None else "the database %s cannot be used: %s" % (path, text))


DATABASE_ERRORS = (  # (words of SQLite's, kind, what it means)
    (("full",), "disk-full", "the disk of the server is full"),
    (("readonly", "read-only"), "read-only", "the data directory cannot be written"),
    (("locked", "busy"), "busy", "the database is busy"),
    (("malformed", "not a database"), "storage-failed",
     "the database is damaged; stop the server and restore a backup into another directory (restore FROM --data NEW)"),
)


# ==== 6. Accounts ========================================================================
#
# Who is asking.  1. Nothing a second process needs lives in memory: sessions, tokens and throttles are rows.
# 2. What is remembered in memory is keyed by a digest of the credential under a key of this process, and counts
#    only while the row "generation" stands where it stood; every change of an account or device raises it.
# 3. Secrets are stored as hashes: passwords by scrypt, random tokens of 160 bits and more by SHA-256.

SCRYPT = (14, 8, 5)             # log2 N, r, p: 16 MiB and 0.15 s; stronger hashes found in rows are honoured
PASSWORD_MIN, PASSWORD_MAX = 10, 1024          # bytes
REMEMBER = 5 * MINUTE           # how long a verified credential is believed
NOTICE = 0.02                   # seconds after which another process's change of accounts is noticed
CONFIRMED = 10 * MINUTE         # how long a password counts as just given
SESSION_IDLE, SESSION_LIFE = 14 * DAY, 90 * DAY
USED_EVERY = 10 * MINUTE        # "last used" is written no more often
WAIT_FIRST, WAIT_MOST = SECOND, 15 * MINUTE    # after a wrong password, doubling
PRESSURE, SLOWED = 100, 0.85    # wrong passwords of strangers in an hour, beyond which each of theirs takes so many seconds longer
HASHES_WAITING, HASHES_HERE = 16, 4            # passwords that wait to be hashed: in all, and from one network
KNOWN_LIFE, KNOWN_MOST = 90 * DAY, 200         # how long a network is known to an account, and how many are
PAIRING = 20 * MINUTE           # how long a device waits to be let in
PAIRINGS, PAIRINGS_HERE = 1000, 30             # that wait at a time: in all, from one address
TOKEN_MARK = "cs_"              # app passwords begin so and are never tried as passwords
ACCOUNT_NAME = re.compile(r"[^\x00-\x20/\\:\x7f\ud800-\udfff](?:[^\x00-\x1f/\\:\x7f\ud800-\udfff]{0,62}[^\x00-\x20/\\:\x7f\ud800-\udfff])?")

COMMON_WORDS = frozenset("""
    abcd abracadabra access admin administrator alejandra alejandro aleksandra alessandra alessandro alexander alexandra
    amanda america anastasia andrea andrew angel anthony antonio apple april arizona armageddon army arsenal asdfgh ashley
    audi august austin australia autumn awesome azerty baby babyboy babycakes babygirl banana bandit barbie barcelona
    baseball basketball batista batman bayern beatles beautiful bella benjamin berlin bestfriend bettyboop billabong
    birthday black blackberry bladerunner blessed blink blue bonjour boston brandon braveheart brazil broncos brooklyn
    bubblegum bubbles business buster buttercup butterfly california callofduty camaro canada carlos carolina caroline
    casablanca cash catherine cellphone champion changeit changeme charles charlie charlotte cheese chelsea cherry chicago
    chicken chocolate chrisbrown christ christian christina christine christmas christophe cinderella classof cloud coffee
    college company computer contrasena cookie cool correcthorsebatterystaple corvette counterstrike cowboy cricket cyber
    daddy daddysgirl dallas daniel darkknight darthvader david december default demon destiny deutschland devil devilmaycry
    diablo diamond digital disney disturbed dolphin dominique dragon dragonball dropbox eagle elephant elizabeth eminem
    england enigma enter enterprise eternity evanescence evangelion everton facebook faith falcon family february fenerbahce
    ferrari finalfantasy firefighter florida flower football forever france francisco freedom freunde friday friend
    friendship friendster gabriel galatasaray gandalf genesis george germany ghost ghostrider ginger godisgood gold
    goldfinger golf golfcourse google green greenday guest hacker hahaha hallo hannah happy harley harrypotter heaven hell
    highlander hockey hollister hollywood honda honey horse hunter iamthebest idontknow ilovemyself india infinity
    information international internet ireland ironmaiden ironman italia jackson jacqueline january jasmine jasper jellybean
    jennifer jessica jesus jesusislord jetaime johncena jordan joseph joshua june justin justinbieb juventus katherine
    kawasaki killer king kitten kitty konstantin lacrosse lakers lalala lamborghini lasvegas lauren leavemealone letmein
    liberty lifeisgood lighthouse lightning linkedin linkinpark lion liverpool lockerroom login london longhorns losangeles
    love loveyou lucky madison madonna maggie magic manager manchester manutd maria marina marine master matrix matthew max
    maximilian melissa mercedes messi metallica mexico michael michelle mickey mickeymouse microphone microsoft minecraft
    mommy monalisa monday money monkey monster morgan mostwanted motdepasse mother motherlode motorola mustang myspace
    naruto natasha nathan needforspeed newcastle newyork nextcloud nicholas nicole nightmare ninja nintendo nirvana nissan
    nokia northside nothing november number october office oliver onedirection open opensesame orange oscar owncloud packers
    painkiller paintball pakistan pantera panther paris parola passe passwd password passwort pathfinder patricia patrick
    patriots peace peanut pepper phantom phoenix pikachu pineapple pirate playstation pokemon police porsche prettygirl
    prince pumpkin puppy purple qazwsx queen qwerty qwertz rabbit racing raiders rainbow ranger realmadrid rebecca redsox
    revolution richard roadrunner robert rocky ronaldinho ronaldo root rosebud runescape russia sailormoon salamander
    samantha samsung samuel schalke schatz school scooby scoobydoo scotland sebastian secret security senha september server
    shadow shevchenko silver simpsons skateboard slipknot smallville smile sniper snoopy soccer softball soldier something
    sommer sony sonyericsson sophie southpark southside spartan spider spiderman spongebob spring starcraft startfinding
    startrek starwars steelers stephanie stephen steven storm strawberry student success sugar summer summertime sunday
    sunflower sunshine superman supersonic superstar surfer sweetheart sweetness sweety swordfish taylor teacher teamo
    teddybear temp tennis tequiero terminator test testing texas thebest thomas thunder thunderbird tiger tinkerbell
    tokiohotel toyota translator trinity trustno underground undertaker university user vampire vanessa veronica victoria
    victory volkswagen volleyball wachtwoord warcraft warrior washington watermelon welcome welkom westside whatever white
    william willkommen windows winner winter wizard wolf wolverine work wrestling xbox yamaha yankees yellow youngmoney
    youtube zombie zxcvbn""".split())
COMMON_REST = (  # what else is among the 3,000 commonest: obscene, or what programs register with.  Not for reading
    b"c-lRZS&ro(3`MtMsWuQu$na5XDG_EufH1s-tiI`LssD~;$-2ijLI`7A4E2oy!lRa!A81+teU=*SJ^BK8K$wM7hy){FS>36{0>;1%B3?Z^jLBx?=y"
    b"C~|FsdfRhRF&<=em$1h61zRC0_4kL%{4wa}mjS2^>G|Ubp;M;6lWrQ=kR730Y)mgzI=0b*|HfK^`SB*_@UjucQ{1r)>mT+3{n1HeCF23$<H-+8pL"
    b"czOjKyp+?>vM$qVq_{F>)pu3L~IY$Zy{o(e|Hn$m0Y8*>~7QqRg1~`SHk*47K(22kqd{N>2?NnDxbixJj>#GWhL)P~<1bupXQr$zuG0{S%Wm_PMF"
    b"QQ(&#qyq6Kn%{C7R}2A8!$p}6|=mLMr(y+O_E9NT`1Ycylj4NkVVSD)nbD0{IuN^rV->|xl=tHbyoE%hyUC>`?qMw?{-{_mAgUd(oEB&#3}k^i$8"
    b"|*K=bE;deKen_tY(G?u*>1b1#C=mFe!{>nMEEt}dUqu5**}_;IFA-tbK3(-b90LYw2f$dWD#jVdb`Tk#A{^1VuLH5$f&49ftmQeSHL`&WMel+xb`")
# Keys that lie in a row, in a zigzag or in the alphabet
RUNS = ("1234567890 qwertyuiop asdfghjkl zxcvbnm qwertz yxcvbnm azerty qsdfghjklm abcdefghijklmnopqrstuvwxyz 1qaz 2wsx 3edc 4rfv "
        "5tgb 6yhn 7ujm 147 258 369 1q2w3e4r5t6y7u8i9o0p qawsedrftgyhujikolp azsxdcfvgbhnjmk").split()
NEIGHBOURS = frozenset(pair for run in RUNS for one, other in zip(run, run[1:]) for pair in (one + other, other + one))
LOOKALIKES = str.maketrans("@4301!$57", "aaeoiisst")
EDGES = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ "


class Device(NamedTuple):
    """A session or an app password, as its owner sees it.  The order is that of Accounts.devices."""
    id: str
    kind: str
    name: str
    readonly: bool
    node: int | None
    created: int
    used: int | None
    address: str


class Pairing(NamedTuple):
    """A device that waits to be let in, as whoever is asked sees it."""
    device: str                  # the name it gave itself
    address: str                 # where it asked from: see network_of
    age: int                     # ms since then
    code: str                    # the same on both sides


class Account(NamedTuple):
    """An account, as an administrator sees it.  The order is that of Accounts.list."""
    id: int
    name: str
    admin: bool
    quota: int | None
    used: int                    # bytes of live files
    files: int
    created: int


class Guess(NamedTuple):
    """A password that somebody gives for an account: what it counts against if it is wrong."""
    account: str                 # the key of the name, whether or not there is such an account
    network: str
    known: bool                  # has the account been used from there?

    @property
    def pair(self) -> str:
        """The subject whose wait grows: this account tried from this network, and no other."""
        return "%s %s %s" % ("known" if self.known else "guess", self.network, self.account)

    @property
    def crowd(self) -> tuple[str, ...]:
        """Subjects that count strangers together; they slow strangers down, and shut out nobody."""
        return () if self.known else ("account " + self.account, "global")


LAST_ADMIN = (  # is an account the only administrator?
    "SELECT 'admin' WHERE EXISTS (SELECT 1 FROM account WHERE id = :id AND admin = 1 AND removed IS NULL) "
    "AND NOT EXISTS (SELECT 1 FROM account WHERE id <> :id AND admin = 1 AND removed IS NULL)")
KNOW_PLACE = "INSERT INTO known_place (account, network, due) VALUES (?, ?, ?) ON CONFLICT (account, network) DO UPDATE SET due = excluded.due"


CROWD_OUT = (  # the oldest that waits, of the network that most wait from
    "DELETE FROM pairing WHERE token = (SELECT token FROM pairing WHERE account IS NULL AND address = (SELECT address FROM pairing "
    "WHERE account IS NULL GROUP BY address ORDER BY count(*) DESC, min(due) LIMIT 1) ORDER BY due LIMIT 1)")


class HashingLane:
    """Where passwords are hashed, one at a time; so many may wait, and from one network so many of them (A5).

    Who gives the same password at the same time, as a program does on several connections, waits as one.
    """

    def __init__(self) -> None:
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._waiting: dict[str, dict[bytes, int]] = {}      # network: {digest: how many wait with it}

    @contextmanager
    def turn(self, network: str, digest: bytes) -> Iterator[None]:
        """raises CloudError busy"""
        with self._lock:
            here = self._waiting.setdefault(network, {})
            if digest not in here and (len(here) >= HASHES_HERE or sum(map(len, self._waiting.values())) >= HASHES_WAITING):
                raise CloudError("busy", "too many logins at once", retry_after=2)
            here[digest] = here.get(digest, 0) + 1
        try:
            with self._turn:
                yield
        finally:
            with self._lock:
                here[digest] -= 1
                if not here[digest]:
                    del here[digest]
                if not here:
                    del self._waiting[network]


class Accounts:
    """Who there is, and by what they prove it."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self.db, self.clock = db, clock
        self._key = secrets.token_bytes(32)
        self._remembered: dict[bytes, tuple[Principal, str, int]] = {}     # credential: (who, generation, due)
        self._used: dict[str, tuple[int, str]] = {}          # device: when and whence, not yet written
        self._refused: dict[bytes, str] = {}                 # wrong credential: generation at which it was
        self._known_lane, self._strangers_lane = HashingLane(), HashingLane()
        self._set_up = False
        self._changes = 0                                    # of accounts and devices, made by this process
        self._seen = "", 0.0, 0                              # the generation, when to look again, changes before the look

    # ---- who is asking

    def identify(self, authorization: str, cookie: str, address: str, *, secure: bool) -> Principal:
        """Who sends these credentials?  ANONYMOUS for none; with a `refusal` for those that do not count.

        authorization   value of the field, or ""
        cookie          the session's cookie, or ""; counts only without Authorization
        secure          whether nobody could listen: TLS, loopback, or a proxy that says so
        """
        credential = authorization or cookie
        if not credential:
            return ANONYMOUS
        if len(credential) > 4 * KiB:
            return ANONYMOUS._replace(refusal=CloudError("unauthenticated", "the credentials are too long"))
        if not secure:
            return ANONYMOUS._replace(refusal=CloudError(
                "insecure", "passwords are not accepted over plain HTTP from another machine; use HTTPS"))
        key = hashlib.blake2b(credential.encode("utf-8", "replace"), key=self._key, digest_size=16).digest()
        generation = self._generation()
        who, then, due = self._remembered.get(key, (None, "", 0))
        if who is None or then != generation or due < self.clock.due():
            try:
                who = self._verify(authorization, cookie, address, key)
            except CloudError as refused:
                return ANONYMOUS._replace(refusal=refused)
            if len(self._remembered) > 1000:
                self._remembered.clear()
            self._remembered[key] = who, generation, self.clock.due() + REMEMBER
        if who.device:
            self._used[who.device] = self.clock.wall(), address
        return who

    def _generation(self) -> str:
        """The generation of accounts and devices, looked up every NOTICE, and after each change by this process."""
        now, changes = time.monotonic(), self._changes
        known, again, before = self._seen
        if now >= again or changes != before:
            known = self.db.read("SELECT value FROM setting WHERE name = 'generation'")[0][0]
            self._seen = known, now + NOTICE, changes
        return known

    def _raise_generation(self, attempt: Callable[[], Batch]) -> None:
        """Commit a change after which nobody is remembered, here at once and elsewhere within NOTICE."""
        def raised() -> Batch:
            batch = attempt()
            batch.body.append(Statement("UPDATE setting SET value = CAST(value AS INTEGER) + 1 WHERE name = 'generation'"))
            return batch

        self.db.write(raised)
        self._changes += 1

    def _verify(self, authorization: str, cookie: str, address: str, key: bytes) -> Principal:
        if not authorization:
            return self._by_secret(cookie, "session")
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return self._by_secret(value.strip(), "token")
        pair = parse_basic(value) if scheme.lower() == "basic" else None
        if pair is None:
            raise CloudError("unauthenticated", "malformed credentials")
        if pair[1].startswith(TOKEN_MARK):
            who = self._by_secret(pair[1], "token")
            if key_of(who.name.casefold()) != key_of(pair[0].casefold()):
                raise CloudError("unauthenticated", "wrong name or password")
            return who
        return self._by_password(*pair, address, key)

    def _by_secret(self, secret: str, kind: str) -> Principal:
        now = self.clock.due()
        rows = self.db.read(
            "SELECT a.id, a.name, coalesce(d.node, a.root), a.admin, d.id, d.readonly, d.node IS NOT NULL, d.confirmed "
            "FROM device d JOIN account a ON a.id = d.account "
            "WHERE d.secret = ? AND d.kind = ? AND a.removed IS NULL "
            "AND coalesce(d.idle, ?) >= ? AND coalesce(d.due, ?) >= ?", (sha256_text(secret), kind, now, now, now, now))
        if not rows:
            raise CloudError("unauthenticated", "this session or token is not valid")
        account, name, root, admin, device, readonly, scoped, confirmed = rows[0]
        return Principal(account, name, root, bool(admin) and kind == "session", kind, device, bool(readonly),
                         bool(scoped), confirmed)

    def _by_password(self, name: str, password: str, address: str, key: bytes = b"") -> Principal:
        """Check name and password, at the same cost whether or not there is such an account (A6).

        The same wrong password once more, as of a device that was not told of a new one, is refused for nothing and
        counts as no guess.
        """
        network, now = network_of(address), self.clock.due()
        if len(password.encode("utf-8", "replace")) > PASSWORD_MAX:
            raise CloudError("unauthenticated", "wrong name or password")
        rows = self.db.read(
            "SELECT id, name, root, admin, password, EXISTS (SELECT 1 FROM known_place k WHERE k.account = account.id "
            "AND k.network = ? AND k.due > ?) FROM account WHERE key = ?", (network, now, account_key(name)))
        known, generation = bool(rows and rows[0][5]), self._generation()
        digest = hashlib.blake2b(("%s\0%s" % (account_key(name), password)).encode("utf-8", "replace"), key=self._key).digest()
        guess = Guess(account_key(name), network, known)
        if self._refused.get(digest) == generation:
            raise CloudError("unauthenticated", "wrong name or password")
        with (self._known_lane if known else self._strangers_lane).turn(network, digest):
            if self._refused.get(digest) == generation:
                raise CloudError("unauthenticated", "wrong name or password")
            remembered = self._remembered.get(key)           # a request beside this one may have been first
            if remembered and remembered[1] == self._generation():
                return remembered[0]
            self._check_throttle(guess.pair)
            if not check_password(password, rows[0][4] if rows else ""):
                self._refuse(guess, digest, generation)
        account, name, root, admin, stored, _ = rows[0]
        self._welcome(account, guess)
        if not stored.startswith("scrypt %d %d %d " % SCRYPT) and is_weaker(stored):
            self.db.run(Statement("UPDATE account SET password = ? WHERE id = ? AND password = ?",
                                  (hash_password(password), account, stored)))
        return Principal(account, name, root, bool(admin), "password", confirmed=self.clock.due() + CONFIRMED)

    def _refuse(self, guess: Guess, digest: bytes, generation: str) -> None:
        """Note a wrong password.  raises CloudError unauthenticated, always"""
        if len(self._refused) > 1000:
            self._refused.clear()
        self._refused[digest] = generation
        self._record_failure(guess.pair, *guess.crowd)
        log.warning("login failed", extra={"account": guess.account[:64], "address": guess.network})
        if guess.crowd and self._pressure(guess.crowd) > PRESSURE:
            time.sleep(SLOWED)                               # in the strangers' lane: who is known does not wait for it
        raise CloudError("unauthenticated", "wrong name or password")

    def _welcome(self, account: int, guess: Guess) -> None:
        """Note that the right password came from a network: from there on strangers' wrong ones do not matter."""
        now = self.clock.due()
        if self.db.read("SELECT 1 FROM throttle WHERE subject = ?", (guess.pair,)):
            self.db.run(Statement("DELETE FROM throttle WHERE subject = ?", (guess.pair,)))
        if not self.db.read("SELECT 1 FROM known_place WHERE account = ? AND network = ? AND due > ?",
                            (account, guess.network, now + KNOWN_LIFE - DAY)):
            self.db.run(Statement(KNOW_PLACE, (account, guess.network, now + KNOWN_LIFE)),
                        Statement("DELETE FROM known_place WHERE account = ?1 AND network NOT IN (SELECT network FROM known_place "
                                  "WHERE account = ?1 ORDER BY due DESC LIMIT ?2)", (account, KNOWN_MOST)))

    # ---- throttling (A4): who guesses waits; nobody waits for what others guess

    def _check_throttle(self, subject: str) -> None:
        now = self.clock.due()
        rows = self.db.read("SELECT due FROM throttle WHERE subject = ? AND due > ?", (subject, now))
        if rows:
            wait = (rows[0][0] - now + 999) // 1000
            log.warning("login throttled", extra={"address": subject[:128]})
            raise CloudError("throttled", "too many wrong passwords; wait %d s" % wait, retry_after=wait)

    def _record_failure(self, *subjects: str) -> None:
        """Double the wait of each; an hour of quiet forgets.  Counted in one statement: none gets lost between two that fail at once."""
        now = self.clock.due()
        self.db.run(Statement(
            "INSERT INTO throttle (subject, failures, due) VALUES (?1, 1, ?2 + ?3) ON CONFLICT (subject) DO UPDATE SET "
            "failures = CASE WHEN due > ?4 THEN failures + 1 ELSE 1 END, "
            "due = ?2 + CASE WHEN due <= ?4 THEN ?3 WHEN failures < 10 THEN ?3 << failures ELSE ?5 END",
            [(subject, now, WAIT_FIRST, now - HOUR, WAIT_MOST) for subject in subjects], many=True))

    def _pressure(self, crowd: tuple[str, ...]) -> int:
        """How many wrong passwords strangers have given of late: for an account, or in all."""
        return self.db.read("SELECT coalesce(max(failures), 0) FROM throttle WHERE subject IN (" + marks(crowd) + ") AND due > ?",
                            (*crowd, self.clock.due() - HOUR))[0][0]

    # ---- set-up

    def is_set_up(self) -> bool:
        self._set_up = self._set_up or bool(self.db.read("SELECT 1 FROM account LIMIT 1"))
        return self._set_up

    def new_setup_token(self) -> str:
        """A token that opens /setup once; the one before it is void."""
        token = secrets.token_urlsafe(16)
        self.db.run(Statement("INSERT OR REPLACE INTO setting VALUES ('setup', ?)", (sha256_text(token),)))
        return token

    def claim(self, token: str, name: str, password: str, address: str) -> None:
        """Make the first account, an administrator's.  raises CloudError forbidden for a wrong or used token"""
        subject = "setup " + network_of(address)
        self._check_throttle(subject)
        stored = self.db.setting("setup")
        if self.is_set_up() or not stored or not hmac.compare_digest(stored, sha256_text(token)):
            self._record_failure(subject)
            raise CloudError("forbidden", "this setup link is not valid any more")
        self.add(name, password, admin=True, first=True)

    # ---- accounts

    def add(self, name: str, password: str, *, admin: bool = False, quota: int | None = None, who: Principal = ANONYMOUS,
            first: bool = False) -> int:
        """Make an account and its empty tree; returns its id.

        first    only if there is none yet; the setup token is used up
        raises   CloudError bad-request for an unfit name or password, exists, forbidden
        """
        if not ACCOUNT_NAME.fullmatch(name) or name.startswith("."):
            raise CloudError("bad-request", "a name has 1 to 64 characters, none of them / \\ : or a control character")
        check_new_password(name, password)
        stored, root = hash_password(password), self.db.new_id()

        def attempt() -> Batch:
            highest, clash = self.db.read("SELECT max(id), (SELECT 1 FROM account WHERE key = ?) FROM account",
                                          (account_key(name),))[0]
            if clash:
                raise CloudError("exists", "there is an account of that name")
            if first and highest:
                raise CloudError("forbidden", "this setup link is not valid any more")
            account, now = (highest or 0) + 1, self.clock.wall()
            return Batch(line=Line(account, who, "account-add", {"name": name, "admin": admin}), body=[
                Statement("INSERT INTO account (id, name, key, root, admin, quota, password, created) "
                          "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                          (account, name, account_key(name), root, int(admin), quota, stored, now)),
                Statement("INSERT INTO entry (home, since, node, name, key, kind, size, mtime, rev) "
                          "SELECT ?, max(seq), ?, '', '', ?, 0, ?, max(seq) FROM journal", (account, root, COLLECTION, now)),
                Statement("INSERT INTO collection SELECT ?, max(seq), 0, 0 FROM journal", (root,)),
                Statement("DELETE FROM setting WHERE name = 'setup'")])

        return self.db.write(attempt).line.home

    def list(self) -> list[Account]:
        return [Account._make(row) for row in self.db.read(
            "SELECT a.id, a.name, a.admin, a.quota, c.size, c.files, a.created FROM account a "
            "JOIN collection c ON c.node = a.root WHERE a.removed IS NULL ORDER BY a.key")]

    def get(self, name: str) -> Account:
        """raises CloudError not-found"""
        for account in self.list():
            if account_key(account.name) == account_key(name):
                return account
        raise CloudError("not-found", "there is no account %s" % name)

    def principal(self, name: str) -> Principal:
        """An account as the command line acts for it.  raises CloudError not-found"""
        account = self.get(name)
        root = self.db.read("SELECT root FROM account WHERE id = ?", (account.id,))[0][0]
        return Principal(account.id, account.name, root, account.admin, "local", confirmed=1 << 62)

    def set_password(self, name: str, password: str, who: Principal = ANONYMOUS) -> None:
        """Change a password; every session ends, and every token with it (A9)."""
        account = self.get(name)
        check_new_password(account.name, password)
        self._change(account, who, "account-password",
                     Statement("UPDATE account SET password = ? WHERE id = ?", (hash_password(password), account.id)),
                     Statement("DELETE FROM device WHERE account = ?", (account.id,)),
                     Statement("DELETE FROM known_place WHERE account = ?", (account.id,)))

    def update(self, name: str, who: Principal, *, admin: bool | None = None, quota: int | None | bool = False) -> Account:
        """Change rights or quota (None is no limit); what is not given stays."""
        account = self.get(name)
        if admin is not None:
            self._change(account, who, "account-admin",
                         Statement("UPDATE account SET admin = ? WHERE id = ?", (int(admin), account.id)),
                         unless=(LAST_ADMIN, "the last administrator must stay one") if not admin else None)
        if quota is not False:
            self._change(account, who, "account-quota",
                         Statement("UPDATE account SET quota = ? WHERE id = ?", (quota, account.id)))
        return self.get(name)

    def remove(self, name: str, who: Principal = ANONYMOUS) -> None:
        """End an account at once; its files go after the days that history is kept."""
        account = self.get(name)
        self._change(account, who, "account-remove",
                     Statement("UPDATE account SET key = NULL, removed = ? WHERE id = ?", (self.clock.due(), account.id)),
                     Statement("DELETE FROM device WHERE account = ?", (account.id,)),
                     Statement("DELETE FROM known_place WHERE account = ?", (account.id,)),
                     Statement("DELETE FROM lock WHERE home = ?", (account.id,)),
                     unless=(LAST_ADMIN + " AND EXISTS (SELECT 1 FROM account WHERE id <> :id AND removed IS NULL)",
                             "make another account an administrator first"))

    def _change(self, account: Account, who: Principal, action: str, *body: Statement, unless: tuple[str, str] | None = None) -> None:
        """Commit a change of an account, unless a condition on it holds: (SELECT with :id, why it is refused then)."""
        guards = [Statement(unless[0], {"id": account.id})] if unless else []

        def attempt() -> Batch:
            if unless and self.db.read(*guards[0][:2]):
                raise CloudError("conflict", unless[1])
            return Batch(list(body), list(guards), line=Line(account.id, who, action, {"name": account.name}))

        self._raise_generation(attempt)
        log.info(action, extra={"account": account.name, "by": who.name})

    # ---- sessions and app passwords

    def log_in(self, name: str, password: str, address: str, agent: str) -> tuple[str, Principal]:
        """Open a session; returns its cookie.  raises CloudError unauthenticated, throttled"""
        who = self._by_password(name, password, address)
        log.info("login", extra={"account": who.name, "address": address})
        secret = secrets.token_urlsafe(32)
        device = self._add_device(who, "session", agent[:100] or "browser", secret, address, idle=SESSION_IDLE,
                                  life=SESSION_LIFE)
        return secret, who._replace(means="session", device=device)

    def add_token(self, who: Principal, name: str, *, readonly: bool = False, node: int | None = None,
                  life: int | None = None) -> tuple[str, str]:
        """Make an app password; returns (device id, the secret, which is shown this once)."""
        if not name.strip() or len(name) > 100:
            raise CloudError("bad-request", "give the device a name of 1 to 100 characters")
        if len(self.devices(who)) >= 500:
            raise CloudError("conflict", "this account has 500 devices; revoke some first")
        secret = TOKEN_MARK + secrets.token_urlsafe(24)
        return self._add_device(who, "token", name.strip(), secret, "", readonly, node, life=life), secret

    def _add_device(self, who: Principal, kind: str, name: str, secret: str, address: str, readonly: bool = False,
                    node: int | None = None, idle: int | None = None, life: int | None = None) -> str:
        batch = self._device_batch(who, kind, name, secret, address, readonly, node, idle, life)
        self.db.write(lambda: batch)
        return batch.body[0].params[0]

    def _device_batch(self, who: Principal, kind: str, name: str, secret: str, address: str, readonly: bool = False,
                      node: int | None = None, idle: int | None = None, life: int | None = None) -> Batch:
        id, now = secrets.token_hex(8), self.clock.due()
        row = (id, who.account, kind, name, sha256_text(secret), int(readonly), node, self.clock.wall(), address,
               now + CONFIRMED if kind == "session" else 0, idle and now + idle, life and now + life)
        return Batch(line=Line(who.account, who, "device-add", {"name": name, "kind": kind}), body=[
            Statement("INSERT INTO device (id, account, kind, name, secret, readonly, node, created, address, confirmed, "
                      "idle, due) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)])

    # ---- devices that a browser lets in

    def begin_pairing(self, device: str, address: str) -> tuple[str, str]:
        """A device waits to be let in; returns a secret for it to ask with, and one for the browser.

        When too many wait, one of the network that most of them come from goes: strangers crowd out themselves.
        raises  CloudError throttled when too many wait from there
        """
        now, network = self.clock.due(), network_of(address)
        waiting, here = self.db.read("SELECT count(*), coalesce(sum(address = ?), 0) FROM pairing WHERE due > ?", (network, now))[0]
        if here >= PAIRINGS_HERE:
            raise CloudError("throttled", "too many devices wait to be let in", retry_after=60)
        poll, token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self.db.run(Statement("DELETE FROM pairing WHERE due <= ?", (now,)),
                    *([Statement(CROWD_OUT)] if waiting >= PAIRINGS else ()),
                    Statement("INSERT INTO pairing VALUES (?, ?, ?, ?, NULL, ?)",
                              (sha256_text(token), sha256_text(poll), device.strip()[:100] or "device", network, now + PAIRING)))
        return poll, token

    def pairing(self, token: str) -> Pairing:
        """The device that waits behind a browser's token.  raises CloudError not-found"""
        now = self.clock.due()
        rows = self.db.read("SELECT device, address, due FROM pairing WHERE token = ? AND account IS NULL AND due > ?",
                            (sha256_text(token), now))
        if not rows:
            raise CloudError("not-found", "this request to log in is not valid any more; start again on the device")
        device, address, due = rows[0]
        return Pairing(device, address, PAIRING - (due - now), pairing_code(token))

    def grant(self, who: Principal, token: str) -> None:
        """Let the waiting device in.  raises CloudError not-found"""
        def attempt() -> Batch:
            self.pairing(token)
            return Batch([Statement("UPDATE pairing SET account = ? WHERE token = ?", (who.account, sha256_text(token)))],
                         [Statement("SELECT 'pairing' WHERE NOT EXISTS (SELECT 1 FROM pairing WHERE token = ? "
                                    "AND account IS NULL)", (sha256_text(token),))])
        self.db.write(attempt)
        log.info("pairing", extra={"account": who.name})

    def collect(self, poll: str) -> tuple[str, str]:
        """(name of the account, app password) for a device that was let in; once.  raises CloudError not-found until then

        The secret is made here and nowhere kept, so whoever reads the database cannot use it.
        """
        secret, hash = TOKEN_MARK + secrets.token_urlsafe(24), sha256_text(poll)

        def attempt() -> Batch:
            rows = self.db.read("SELECT a.id, a.name, p.device FROM pairing p JOIN account a ON a.id = p.account "
                                "WHERE p.poll = ? AND p.due > ? AND a.removed IS NULL", (hash, self.clock.due()))
            if not rows:
                raise CloudError("not-found", "nobody has let this device in yet")
            who = Principal(*rows[0][:2])
            batch = self._device_batch(who, "token", rows[0][2], secret, "")
            batch.body.append(Statement("DELETE FROM pairing WHERE poll = ?", (hash,)))
            batch.guards.append(Statement("SELECT 'pairing' WHERE NOT EXISTS (SELECT 1 FROM pairing WHERE poll = ?)", (hash,)))
            names.append(who.name)
            return batch

        names: list[str] = []
        self.db.write(attempt)
        return names[-1], secret

    def devices(self, who: Principal) -> list[Device]:
        return [Device._make(row) for row in self.db.read(
            "SELECT id, kind, name, readonly, node, created, used, address FROM device WHERE account = ? "
            "AND coalesce(idle, ?) >= ? AND coalesce(due, ?) >= ? ORDER BY created DESC",
            (who.account, *[self.clock.due()] * 4))]

    def revoke(self, who: Principal, id: str) -> None:
        """End a session or token of the same account, at once.  raises CloudError not-found"""
        for device in self.devices(who):
            if device.id == id:
                self._raise_generation(lambda: Batch([Statement("DELETE FROM device WHERE id = ?", (id,))],
                                                     line=Line(who.account, who, "device-remove", {"name": device.name})))
                return
        raise CloudError("not-found", "there is no such device")

    def check(self, who: Principal, password: str, address: str) -> None:
        """Is it the password of the account?  raises CloudError unauthenticated, throttled"""
        self._by_password(who.name, password, address)

    def confirm(self, who: Principal, password: str, address: str) -> None:
        """Take the password once more, for what needs it fresh (A16)."""
        if who.means == "session":
            self._by_password(who.name, password, address)
            self._raise_generation(lambda: Batch([Statement("UPDATE device SET confirmed = ? WHERE id = ?",
                                                            (self.clock.due() + CONFIRMED, who.device))]))

    def save_used(self) -> None:
        """Write when and whence devices were last used; the janitor does so every minute."""
        used, self._used = self._used, {}
        old = {id: at or 0 for id, at in self.db.read("SELECT id, used FROM device")} if used else {}
        rows = [(at, address, self.clock.due() + SESSION_IDLE, id) for id, (at, address) in used.items()
                if at - old.get(id, at) >= USED_EVERY or not old.get(id, 1)]
        if rows:
            due = self.clock.due() + KNOWN_LIFE
            self.db.run(Statement("UPDATE device SET used = ?, address = ?, "
                                  "idle = CASE WHEN idle IS NULL THEN NULL ELSE ? END WHERE id = ?", rows, many=True),
                        Statement("INSERT INTO known_place (account, network, due) SELECT account, ?, ? FROM device WHERE id = ? "
                                  "ON CONFLICT (account, network) DO UPDATE SET due = excluded.due",
                                  [(network_of(address), due, id) for _, address, _, id in rows], many=True))


def account_key(name: str) -> str:
    """What account names are compared by."""
    return unicodedata.normalize("NFC", name.casefold())


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def hash_password(password: str) -> str:
    """"scrypt LOG2N R P SALT HASH" """
    salt = secrets.token_bytes(16)
    return "scrypt %d %d %d %s %s" % (*SCRYPT, salt.hex(), scrypt(password, salt, *SCRYPT).hex())


def scrypt(password: str, salt: bytes, log2n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, n=1 << log2n, r=r, p=p, dklen=32,
                          maxmem=(128 * r << log2n) + 64 * MiB)


def check_password(password: str, stored: str) -> bool:
    """Is it the password behind this hash?  An empty hash belongs to nobody and costs the same."""
    _, log2n, r, p, salt, want = (stored or "scrypt %d %d %d 00 00" % SCRYPT).split(" ")
    found = scrypt(password, bytes.fromhex(salt), int(log2n), int(r), int(p))
    return hmac.compare_digest(found, bytes.fromhex(want))


def is_weaker(stored: str) -> bool:
    """Was this hash made with less work than hashes are made with now?"""
    _, log2n, r, p, *_ = stored.split(" ")
    return int(r) * int(p) << int(log2n) < SCRYPT[1] * SCRYPT[2] << SCRYPT[0]


def check_new_password(name: str, password: str) -> None:
    size = len(password.encode("utf-8", "replace"))
    if not PASSWORD_MIN <= size <= PASSWORD_MAX:
        raise CloudError("bad-request", "a password has %d to %d characters" % (PASSWORD_MIN, PASSWORD_MAX))
    if is_common(password, name) or password.startswith(TOKEN_MARK):
        raise CloudError("bad-request", "that password is too easy to guess")


def is_common(password: str, name: str = "") -> bool:
    """Would a guesser try it among the first? (A3)

    One or two common words or the account's name, also in p@ssw0rd's spelling, with digits and signs around them; keys
    in a row; digits alone; few different characters; each also when it is only repeated; the 3,000 commonest anyway.
    """
    folded = password.lower()
    folded = folded[:(folded + folded).find(folded, 1)]          # what it repeats, or all of it
    if len(set(folded)) < 5 or not count_letters(folded) and len(password) < 16:
        return True
    if is_run(folded) or len(folded) > 5 and is_run(folded[::2]) and is_run(folded[1::2]):
        return True
    words = {*COMMON_WORDS, name.lower()} if len(name) > 2 else COMMON_WORDS
    trimmed = (folded, folded.strip(EDGES), folded.lstrip(EDGES), folded.rstrip(EDGES))
    return any(is_mostly(words, spelt) for text in trimmed for spelt in {text, text.translate(LOOKALIKES)}) \
        or folded in zlib.decompress(base64.b85decode(COMMON_REST)).decode().split()


def count_letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def is_run(text: str) -> bool:
    """Do three quarters of it lie in runs of three and more, of neighbours or of one character?"""
    steps = [one == other or one + other in NEIGHBOURS for one, other in zip(text, text[1:])]
    runs = [len(list(run)) + 1 for near, run in itertools.groupby(steps) if near]
    return 4 * sum(run for run in runs if run > 2) >= 3 * len(text)


def is_mostly(words: Iterable[str], text: str) -> bool:
    """Is there hardly more to a text than one or two of these words?"""
    found = sorted((word for word in words if word in text), key=len, reverse=True)
    left = text
    for word in found[:2]:
        left = left.replace(word, "")
    return bool(found) and len(left) < PASSWORD_MIN and count_letters(left) < 3


def pairing_code(token: str) -> str:
    """Six digits that both sides of a pairing can show, so that a person sees that they belong together."""
    digits = "%06d" % (int(sha256_text("code " + token)[:12], 16) % 1_000_000)
    return digits[:3] + " " + digits[3:]


def network_of(address: str) -> str:
    """What counts as one address for throttling: an IPv4 address, an IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


# ==== 7. Operations ======================================================================
#
# Every verb, behind every door.  1. A verb takes who, then what, then Preconditions.  2. It checks rights, stores
# bytes, then commits one batch; nothing it decided on can have changed by then, because guards restate it.
# 3. The tree changes only through _batch(), which turns Changes into rows, sums and one journal line.
# 4. Sums: a collection's row counts the live files below it, and its seq is the last write anywhere below.
# 5. account.shape is raised whenever a collection leaves its place, a lock appears or history is given up; a batch
#    that was decided at the same shape may rely on its path, on the locks and on the past it saw.
# 6. What is given up for good (fate "purged") can neither be read nor brought back, and what is live is never given up:
#    each statement that gives up says so itself.

NODE = ("e.node, e.home, e.since, e.until, e.parent, e.name, e.kind, e.manifest, coalesce(c.size, e.size), e.mtime, "
        "e.media, e.rev, e.fate, c.seq, c.files")
CHUNK = "h.hash, h.size, h.data, h.object"
STAR = "{http://owncloud.org/ns}favorite"        # the dead property of what somebody marked, in the words of most clients
TEXT_LIMIT = MiB                # bytes of a text file whose contents are found by a search
THUMBNAIL_LIMIT = 64 * KiB      # bytes of one
STARRED = '<o:favorite xmlns:o="http://owncloud.org/ns">1</o:favorite>'
RESERVED = "coalesce(sum(max(coalesce(size, 0), received)), 0)"          # bytes that uploads under way may come to
STRIDE = 24                     # names that one statement walks down
RESERVE = 16 * MiB              # put by for the moment when the disk is full; less on a small one
LOCK_MOST = 24 * 3600           # seconds a lock may be granted for
KEEP_MOST = 36500               # days that history may be kept
LONG_HASH = 64 * MiB            # larger files are hashed in the lane for long work


class Spot(NamedTuple):
    """Where a path leads."""
    home: int
    shape: int
    locked: bool                 # are there locks in this home at all?
    quota: int | None
    used: int                    # bytes live in the home
    chain: tuple[int, ...]       # ids of what contains it, the root of the home first, as far as it exists
    open: bool                   # is the last of chain a collection?
    rest: tuple[str, ...]        # names below chain that do not exist; () if the node does
    node: Node | None
    chunk: StoredChunk | None = None
    guards: tuple["Statement", ...] = ()         # what was looked at on the way to a write, and must hold when it is done

    @property
    def parent(self) -> int:
        return self.chain[-1]


@lru_cache(maxsize=2 * STRIDE + 2)
def path_query(depth: int, content: bool) -> str:
    """A SELECT from the start node and `depth` keys to everything Spot needs: one index search per name."""
    names = ["p%d" % n for n in range(1, depth)] + ["e"]
    joins, above = [], "?"
    for name in names:
        joins.append("LEFT JOIN entry %s ON %s.parent = %s AND %s.key = ? AND %s.until IS NULL"
                     % (name, name, above, name, name))
        above = name + ".node"
    parents = "".join("p%d.node, " % n for n in range(1, depth))
    return ("SELECT a.shape, EXISTS (SELECT 1 FROM lock WHERE home = a.id), a.quota, r.size, k.node, %s%s%s FROM account a "
            "JOIN collection r ON r.node = a.root %s LEFT JOIN collection c ON c.node = e.node "
            "LEFT JOIN collection k ON k.node = %s %s WHERE a.id = ?" % (
                parents, NODE, ", " + CHUNK if content else "", " ".join(joins),
                "p%d.node" % (depth - 1) if depth > 1 else "?",
                "LEFT JOIN chunk h ON h.hash = e.manifest" if content else ""))


def unwatched() -> None:
    """Nobody waits who could leave: the default of `alive`, which long reads call now and then and which ends them by raising."""


def watched(rows: Iterable[Any], alive: Callable[[], None], every: int = 256) -> Iterator[Any]:
    """The same rows, with a look now and then whether anybody still waits for them."""
    for count, row in enumerate(rows):
        if count % every == 0:
            alive()
        yield row


class Shares:
    """How much each has of what all share: so many at a time of something, and no more."""

    def __init__(self, most: int, words: str, retry_after: int = 5) -> None:
        """`words` with %d for `most` tell who wants more."""
        self.most, self.words, self.retry_after = most, words, retry_after
        self._lock, self._counts = threading.Lock(), {}

    def take(self, key: Any) -> None:
        """raises CloudError busy"""
        with self._lock:
            count = self._counts.get(key, 0)
            if count >= self.most:
                raise CloudError("busy", self.words % self.most, retry_after=self.retry_after)
            self._counts[key] = count + 1

    def give(self, key: Any) -> None:
        with self._lock:
            if self._counts[key] > 1:
                self._counts[key] -= 1
            else:
                del self._counts[key]

    @contextmanager
    def of(self, key: Any) -> Iterator[None]:
        """One of them, for as long as something takes."""
        self.take(key)
        try:
            yield
        finally:
            self.give(key)

    def taken(self) -> int:
        """How many all have together."""
        return sum(self._counts.values())


class Listing:
    """A node and its children under one snapshot, for as long as that is held."""

    def __init__(self, node: Node, read: Callable[..., Iterator[tuple[Any, ...]]], now: int) -> None:
        self.node, self.read, self.now = node, read, now
        self._locks: list[Lock] | None = None

    def children(self) -> Iterator[Node]:
        """In the order of names."""
        return map(Node._make, self.read(
            "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node "
            "WHERE e.parent = ? AND e.until IS NULL ORDER BY e.key", (self.node.node,)))

    def page(self, order: str, descending: bool, start: int, limit: int, *, collections_first: bool = False) -> Iterator[Node]:
        """Some of the children; `order` is an expression of SORTS."""
        direction = " DESC" if descending else ""
        return map(Node._make, self.read(
            "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node WHERE e.parent = ? AND e.until IS NULL "
            "ORDER BY " + "e.kind DESC, " * collections_first + order + direction + ", e.key" + direction + " LIMIT ? OFFSET ?", (self.node.node, limit, start)))

    def properties(self) -> dict[int, dict[str, str]]:
        """Dead properties of the node and its children: {node: {"{namespace}name": XML}}."""
        found: dict[int, dict[str, str]] = {}
        for node, name, value in self.read(
                "SELECT node, name, value FROM property WHERE node = ? UNION ALL SELECT p.node, p.name, p.value FROM entry e "
                "JOIN property p ON p.node = e.node WHERE e.parent = ? AND e.until IS NULL", (self.node.node,) * 2):
            found.setdefault(node, {})[name] = value
        return found

    def digests(self) -> dict[str, list[tuple[str, str]]]:
        """Checksums of the file or of the children that are files: {manifest: [("sha1", hex), ...]}."""
        found: dict[str, list[tuple[str, str]]] = {}
        for manifest, kind, value in self.read(
                "SELECT d.manifest, d.kind, d.value FROM digest d WHERE d.manifest = ? UNION SELECT d.manifest, d.kind, d.value "
                "FROM entry e JOIN digest d ON d.manifest = e.manifest WHERE e.parent = ? AND e.until IS NULL",
                (self.node.manifest, self.node.node)):
            found.setdefault(manifest, []).append((kind, value))
        return found

    def pictured(self) -> set[str]:
        """Which of the contents have a thumbnail: {manifest}."""
        return {manifest for (manifest,) in self.read(
            "SELECT t.manifest FROM thumbnail t WHERE t.home = ? AND t.manifest = ? UNION SELECT t.manifest FROM entry e "
            "JOIN thumbnail t ON t.home = e.home AND t.manifest = e.manifest WHERE e.parent = ? AND e.until IS NULL",
            (self.node.home, self.node.manifest, self.node.node))}

    def locks(self, node: Node) -> list[Lock]:
        """The locks that hold the node or one of its children."""
        if self._locks is None:
            self._locks = [Lock._make(row) for row in self.read("SELECT * FROM lock WHERE home = ? AND due > ?",
                                                                (self.node.home, self.now))]
            self._above = {id for id, _ in self.read(UP, (self.node.node,))} if self._locks else set()
        return [lock for lock in self._locks if lock.node == node.node or lock.deep and lock.node in self._above]


UP = (  # a live node and what holds it, upwards: (node, parent)
    "WITH RECURSIVE up (node, parent, level) AS (SELECT node, parent, 0 FROM entry WHERE node = ? AND until IS NULL "
    "UNION ALL SELECT e.node, e.parent, level + 1 FROM up JOIN entry e ON e.node = up.parent AND e.until IS NULL) "
    "SELECT node, parent FROM up ORDER BY level")


BRAKE_FILES, BRAKE_SHARE, BRAKE_WINDOW = 200, 4, 10 * MINUTE       # held: over 200 files and over a quarter in the window
BRAKE_FREE = HOUR               # how long a device that was allowed may do everything


class Brake(NamedTuple):
    """What a device deleted and overwrote of late.  The order is that of the table's columns."""
    device: str
    home: int
    seq: int
    due: int
    files: int
    deletes: int
    overwrites: int
    held: int | None
    free: int


CHUNK_ROWS = (  # makes chunks known; one that was given up or found damaged is good again
    "INSERT INTO chunk (hash, size, object, at, data) VALUES (?, ?, ?, ?, ?) ON CONFLICT (hash) DO "
    "UPDATE SET condemned = NULL, at = excluded.at, bad = NULL, "
    "object = CASE WHEN bad IS NULL THEN object ELSE excluded.object END, "
    "data = CASE WHEN bad IS NULL THEN data ELSE excluded.data END WHERE condemned IS NOT NULL OR bad IS NOT NULL")


class Changed(NamedTuple):
    """A node that a batch touched: where it is now and where it was, seen from a collection; None: out of sight."""
    id: int
    kind: int
    node: Node | None
    path: tuple[str, ...] | None
    was: tuple[str, ...] | None


class Tree:
    """The live tree: finding, writing, moving, properties, locks.  The ground floor of Cloud."""

    def __init__(self, config: Config, clock: Clock | None = None, *, how: str = "make") -> None:
        """Open the data directory.  raises CloudError, OSError

        how   "make": making it if need be; "open": it must be there; "read": it must be there, and stays as it is
        """
        self.config, self.clock = config, clock or Clock()
        check_presence(config.data, how)
        store = ObjectDirectory(config.data / "objects")
        if how != "read":
            claim_directory(config.data)
            if not (config.data / "objects" / "ff").exists():
                store.create()
        self.blobs = Blobs(store)
        self.db = Database(config.data / "cloud.db", self.clock, readonly=how == "read")
        self.accounts = Accounts(self.db, self.clock)
        self.op: tuple[str, str] | None = None           # what batches bear: see Cloud.once
        self._free: tuple[int, bool] = (0, True)         # until when the disk counts as free
        self._lanes = Shares(2, "%d long operations of this account are under way already")
        self._waits = Shares(WAITS, "%d of this account wait for changes already")
        self.closing = threading.Event()

    def close(self) -> None:
        self.blobs.lane.shutdown(wait=True)
        self.db.close()

    @property
    def epoch(self) -> str:
        """Which server this is; a new one after a restore (R29)."""
        return self.db.setting("epoch")

    def policy(self) -> Policy:
        """What an administrator may change while the server runs; until then it is what the command line says."""
        given = Policy(self.config.keep_days, *(parse_size(text) if text else None
                                                for text in (self.config.history, self.config.quota)))
        return given._replace(**json.loads(self.db.setting("policy") or "{}"))

    def set_policy(self, who: Principal, **values: int | None) -> Policy:
        """Change some of it; returns the whole.  What somebody else changes at the same time stays changed."""
        def attempt() -> Batch:
            stored, policy = self.db.setting("policy"), self.policy()._replace(**values)
            if not 0 <= policy.keep_days <= KEEP_MOST:
                raise CloudError("bad-request", "keep_days is 0 to %d" % KEEP_MOST)
            return Batch([Statement("INSERT OR REPLACE INTO setting VALUES ('policy', ?)", (json.dumps(policy._asdict()),))],
                         [Statement("SELECT 'policy' WHERE (SELECT value FROM setting WHERE name = 'policy') IS NOT ?", (stored,))],
                         line=Line(0, who, "settings", values))

        self.db.write(attempt)
        log.info("settings", extra={"by": who.name})
        return self.policy()

    def keep_reserve(self) -> None:
        """Have room put by for the moment when the disk is full, as long as it is not (R18)."""
        usage = shutil.disk_usage(self.config.data)
        size = min(RESERVE, usage.total // 64)
        if usage.free > size + min(parse_size(self.config.low_water), usage.total // 50):
            self.db.reserve.keep(size)

    def health(self) -> str:
        """"ok", "low" when the disk is almost full, "read-only" when nothing can be written."""
        if self.db.broken:
            return "read-only"
        return "ok" if self._disk_has_room() else "low"

    # ---- finding

    def stat(self, who: Principal, path: tuple[str, ...]) -> Node:
        """The node at a path.  raises CloudError not-found"""
        return self._found(self._spot(who, path))

    def open(self, who: Principal, path: tuple[str, ...]) -> tuple[Node, Content | None]:
        """A file and its bytes; None in place of bytes for a collection.  raises CloudError not-found"""
        spot = self._spot(who, path, content=True)
        node = self._found(spot)
        return node, None if node.kind else self._content(node, spot.chunk)

    @contextmanager
    def listing(self, who: Principal, path: tuple[str, ...]) -> Iterator["Listing"]:
        """A node and what it holds, all of one moment.  raises CloudError not-found"""
        node = self.stat(who, path)
        with self.db.snapshot() as read:
            rows = list(read("SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node "
                             "WHERE e.node = ? AND e.until IS NULL", (node.node,)))
            if not rows:
                raise CloudError("not-found", "it was just deleted")
            yield Listing(Node._make(rows[0]), read, self.clock.due())

    def _found(self, spot: Spot) -> Node:
        if spot.node is None:
            raise CloudError("not-found", "there is nothing at this path")
        return spot.node

    def find(self, who: Principal, path: tuple[str, ...]) -> Node | None:
        """The node at a path, if there is one."""
        return self._spot(who, path).node

    def _content(self, node: Node, only: StoredChunk | None = None) -> Content:
        """The bytes of a version; `only` is its chunk if it has one and the caller has read it."""
        return self.content_of(node.manifest, node.size, only)

    def content_of(self, manifest: str, size: int, only: StoredChunk | None = None) -> Content:
        if manifest[0] != "m":
            if only is None:
                rows = self.db.read("SELECT " + CHUNK + " FROM chunk h WHERE hash = ?", (manifest,))
                only = StoredChunk._make(rows[0]) if rows else None
            if only is None:
                raise CloudError("storage-failed", "a part of the file is missing")
            return Content(self.blobs, size, only)
        return Content(self.blobs, size, more=lambda offset: [
            (at, StoredChunk._make(chunk)) for at, *chunk in self.db.read(
                "SELECT m.offset, " + CHUNK + " FROM manifest_chunk m JOIN chunk h ON h.hash = m.chunk "
                "WHERE m.manifest = ? AND m.offset >= (SELECT max(offset) FROM manifest_chunk WHERE manifest = ? "
                "AND offset <= ?) ORDER BY m.offset LIMIT 64", (manifest, manifest, offset))])

    def _spot(self, who: Principal, path: tuple[str, ...], *, content: bool = False) -> Spot:
        """Follow a path from the root of `who`.  raises CloudError forbidden for nobody"""
        if not who.account:
            raise CloudError("forbidden", "nobody is logged in")
        if not path:
            return self._root_spot(who)
        above = self._above(who.root) + (who.root,) if who.scoped else (who.root,)
        keys = [key_of(name) for name in path]
        walked = 0
        while len(keys) - walked > STRIDE:                   # far down: in several steps
            ids = self._spot_row(above[-1], keys[walked:walked + STRIDE], who.account, False)
            below = ids[5:4 + STRIDE] + ids[4 + STRIDE:5 + STRIDE]
            there = next((n for n, id in enumerate(below) if id is None), STRIDE)
            above += below[:there]
            walked += there
            if there < STRIDE:
                break
        depth = min(len(keys) - walked, STRIDE)
        row = self._spot_row(above[-1], keys[walked:walked + depth], who.account, content)
        parents, tail = row[5:4 + depth], row[4 + depth:]
        there = next((n for n, id in enumerate(parents) if id is None), depth - 1)
        chain, rest = above + parents[:there], path[walked + there:]
        node = Node._make(tail[:15]) if tail[0] is not None else None
        chunk = StoredChunk._make(tail[15:]) if content and tail[15] is not None else None
        is_open = row[4] is not None if there == depth - 1 else self._is_collection(chain[-1])
        return Spot(who.account, row[0], bool(row[1]), row[2], row[3], chain, is_open, () if node else rest, node, chunk)

    def _spot_row(self, start: int, keys: Sequence[str], account: int, content: bool) -> tuple[Any, ...]:
        params = (start, *keys, start, account) if len(keys) == 1 else (start, *keys, account)
        rows = self.db.read(path_query(len(keys), content), params)
        if not rows:
            raise CloudError("forbidden", "this account does not exist any more")
        return rows[0]

    def _root_spot(self, who: Principal) -> Spot:
        above = self._above(who.root) if who.scoped else ()
        rows = self.db.read(
            "SELECT a.shape, EXISTS (SELECT 1 FROM lock WHERE home = a.id), a.quota, r.size, " + NODE + " FROM account a "
            "JOIN collection r ON r.node = a.root LEFT JOIN entry e ON e.node = ? AND e.until IS NULL "
            "LEFT JOIN collection c ON c.node = e.node WHERE a.id = ?", (who.root, who.account))
        if not rows or rows[0][4] is None:
            raise CloudError("not-found", "the collection this device is limited to is gone")
        shape, locked, quota, used, *node = rows[0]
        return Spot(who.account, shape, bool(locked), quota, used, above, True, (), Node._make(node))

    def _is_collection(self, node: int) -> bool:
        return bool(self.db.read("SELECT 1 FROM collection WHERE node = ?", (node,)))

    def _above(self, node: int) -> tuple[int, ...]:
        """Ids of the collections that hold a node now, the root of its home first.

        raises  CloudError not-found if it, or one of them, is not live
        """
        rows = self.db.read(UP, (node,))
        if not rows or rows[-1][1] is not None:
            raise CloudError("not-found", "there is nothing of that id")
        return tuple(id for id, _ in reversed(rows))[:-1]

    def path_of(self, who: Principal, node: int) -> tuple[str, ...]:
        """Where a live node is for `who`.  raises CloudError not-found if that is nowhere"""
        rows = self.db.read(
            "WITH RECURSIVE up (node, parent, name, level) AS (SELECT node, parent, name, 0 FROM entry WHERE node = ? "
            "AND until IS NULL UNION ALL SELECT e.node, e.parent, e.name, level + 1 FROM up JOIN entry e "
            "ON e.node = up.parent AND e.until IS NULL WHERE up.node <> ?) SELECT node, name FROM up ORDER BY level",
            (node, who.root))
        if not rows or rows[-1][0] != who.root:
            raise CloudError("not-found", "there is nothing of that id")
        if who.scoped:
            self._above(who.root)                        # a device whose collection is in the trash sees nothing
        return tuple(name for _, name in reversed(rows[:-1]))

    def _path_or_none(self, who: Principal, node: int) -> tuple[str, ...] | None:
        try:
            return self.path_of(who, node)
        except CloudError:
            return None

    def walk(self, who: Principal, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Everything below a path, (path from there, node), collections before what they hold."""
        pending = [((), self.stat(who, path))]
        while pending:
            above, node = pending.pop()
            for child in map(Node._make, self.db.each(
                    "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node "
                    "WHERE e.parent = ? AND e.until IS NULL ORDER BY e.key", (node.node,))):
                yield above + (child.name,), child
                if child.kind:
                    pending.append((above + (child.name,), child))

    def sums(self, node: Node) -> dict[str, str]:
        """The checksums that are known of a file: {"sha1": hex}."""
        found = dict(self.db.read("SELECT kind, value FROM digest WHERE manifest = ? UNION ALL SELECT 'sha256', sha256 "
                                  "FROM manifest WHERE id = ? AND sha256 IS NOT NULL", (node.manifest,) * 2))
        return found if node.manifest[0] == "m" else {**found, "sha256": node.manifest}

    def checksum(self, who: Principal, path: tuple[str, ...], kind: str, alive: Callable[[], None] = unwatched) -> tuple[Node, str]:
        """A file and its checksum of a kind ("sha1"), computed if it is not known, and then kept."""
        self._require(who)
        node, content = self.open(who, path)
        if content is None:
            raise CloudError("conflict", "a collection has no checksum")
        known = self.sums(node).get(kind)
        if known is None:
            digest = new_digest(kind)
            with self._heavy(who) if node.size > LONG_HASH else nullcontext():
                for part in content.slices():
                    for piece in watched((part,) if isinstance(part, bytes) else read_pieces(part), alive):
                        digest.update(piece)
            known = digest.hexdigest()
            self.db.run(Statement("INSERT INTO digest (manifest, kind, value) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                                  (node.manifest, kind, known)))
        return node, known

    # ---- what must hold before a write

    def _require(self, who: Principal) -> None:
        if who.readonly:
            raise CloudError("forbidden", "this device may only read")

    def _admit(self, who: Principal, spot: Spot, path: tuple[str, ...], given: Preconditions) -> Spot:
        """Check conditions and locks for a change of what is at a path, or of what shall be there; returns the spot with
        the guards that restate them."""
        if given is not ANY:
            spot = self._check_conditions(who, spot, path, given)
        if spot.locked:
            self._check_locks(who, spot, given)
        return spot

    def _check_conditions(self, who: Principal, spot: Spot, path: tuple[str, ...], given: Preconditions) -> Spot:
        """Refuse unless what a request demands of the present state holds; returns the spot with guards that restate it (R14)."""
        if given is ANY:
            return spot
        node = spot.node
        if given.if_match:
            if node is None or not ("*" in given.if_match or node.etag in given.if_match):
                raise CloudError("precondition-failed", "it has changed")
        elif given.unmodified_since is not None and node and node.mtime // 1000 * 1000 > given.unmodified_since:
            raise CloudError("precondition-failed", "it has changed")
        if given.if_none_match and node is not None:
            if "*" in given.if_none_match and path and node.name != path[-1]:
                raise CloudError("twin", "the same name is there in another Unicode form")
            if "*" in given.if_none_match or node.etag in given.if_none_match:
                raise CloudError("precondition-failed", "it is there already")
        guards = [unchanged(spot)] if node else []       # a name that must be free is guarded by its index
        if given.lists:
            held = next(filter(None, (self._holds(who, path, *conditions) for conditions in given.lists)), None)
            if held is None:
                raise CloudError("precondition-failed", "the If field does not hold")
            guards += held
        return spot._replace(guards=spot.guards + tuple(guards))

    def _holds(self, who: Principal, path: tuple[str, ...], other: tuple[str, ...] | None,
               conditions: tuple[tuple[bool, str, str], ...]) -> list[Statement] | None:
        """The guards that restate one list of an If field; None if it does not hold for its resource (RFC 4918 s10.4.3)."""
        spot = self._spot(who, path if other is None else other)
        tokens = {lock.token for lock in self._covering(spot, self._locks(spot))} if spot.locked else set()
        etag = spot.node.etag if spot.node else None
        if not all(wanted == (value in tokens if kind == "token" else value == etag) for wanted, kind, value in conditions):
            return None
        return [unchanged(spot), *(Statement("SELECT 'lock' WHERE NOT EXISTS (SELECT 1 FROM lock WHERE token = ? AND due > ?)",
                                             (value, self.clock.due()))
                                   for wanted, kind, value in conditions if wanted and kind == "token")]

    def _locks(self, spot: Spot) -> list[Lock]:
        return [Lock._make(row) for row in self.db.read("SELECT * FROM lock WHERE home = ? AND due > ?",
                                                        (spot.home, self.clock.due()))]

    def _covering(self, spot: Spot, locks: list[Lock]) -> list[Lock]:
        """The locks that hold the node at a spot: its own, and deep ones from above."""
        return [lock for lock in locks
                if spot.node and lock.node == spot.node.node or lock.deep and lock.node in spot.chain]

    def _check_locks(self, who: Principal, spot: Spot, given: Preconditions, *, below: bool = False,
                     member: bool | None = None) -> None:
        """Refuse unless the locks in the way are the caller's and were submitted (RFC 4918 s7).

        below    what hangs below the node is affected too: delete, move, overwrite
        member   the parent gains or loses a member; None means: if there is no node yet
        """
        locks = self._locks(spot)
        held = self._covering(spot, locks)
        if (spot.node is None if member is None else member) and spot.chain:
            held += [lock for lock in locks if lock.node == spot.parent and not lock.deep]
        if below and spot.node:
            held += [lock for lock in locks if lock.node != spot.node.node and lock not in held
                     and spot.node.node in self._above_or_none(lock.node)]
        mine = {lock.token for lock in held if lock.account == who.account and lock.token in given.tokens}
        shared = {lock.node for lock in held if not lock.exclusive and lock.token in mine}
        for lock in held:
            if lock.token not in mine and (lock.exclusive or lock.node not in shared):
                raise CloudError("locked", "it is locked", path=self._path_or_none(who, lock.node))

    def _above_or_none(self, node: int) -> tuple[int, ...]:
        try:
            return self._above(node)
        except CloudError:
            return ()

    def _check_space(self, spot: Spot, growth: int, size: int) -> None:
        """Refuse what exceeds quota or disk.  `growth` of the live bytes, `size` to be stored; both in bytes."""
        if size > parse_size(self.config.max_file):
            raise CloudError("too-large", "files may have %s" % format_size(parse_size(self.config.max_file)))
        if spot.quota is not None and growth > 0 and spot.used + self._reserved(spot.home) + growth > spot.quota:
            raise CloudError("over-quota", "%s are left of the quota" % format_size(max(0, spot.quota - spot.used)))
        if size and not self._disk_has_room():
            raise CloudError("disk-full", "the disk of the server is almost full")

    def _reserved(self, home: int) -> int:
        return self.db.read("SELECT " + RESERVED + " FROM upload WHERE home = ? AND done IS NULL", (home,))[0][0]

    def _disk_has_room(self) -> bool:
        """Is there more free space than the low-water mark?  Looked up once a second (R18)."""
        now = self.clock.due()
        if now >= self._free[0]:
            usage = shutil.disk_usage(self.config.data)
            self._free = now + SECOND, usage.free >= min(parse_size(self.config.low_water), usage.total // 50)
        return self._free[1]

    # ---- writing

    def write(self, who: Principal, path: tuple[str, ...], body: Body, given: Preconditions = ANY, *,
              mtime: int | None = None, sums: dict[str, str] | None = None, parents: bool = False) -> tuple[Node, bool]:
        """Make `body` the new content of the file at a path; returns the node it became and whether it is new.

        mtime    ms since 1970; now if None
        sums     checksums the bytes must have: {"sha1": hex}
        parents  make missing collections on the way
        raises   CloudError no-parent, conflict, precondition-failed, locked, over-quota, disk-full, bad-checksum

        Bytes go first and hold no lock; one batch then only moves a pointer.  A crash between the two leaves
        unreferenced chunks, which the sweep removes, and never a node without its bytes.
        """
        self._require(who)
        spots = [self._spot_for_file(who, path, given, body.length or 0, parents)]   # before a byte is read
        stored = self.blobs.put(body, partial(self._knows, spots[0].home), sums or ())
        for kind, value in (sums or {}).items():
            if stored.digests[kind] != value:
                raise CloudError("bad-checksum", "what arrived does not have the checksum that was announced")
        at = self.clock.wall() if mtime is None else mtime

        def attempt() -> Batch:                          # run again when a guard finds that somebody was faster
            spot = spots.pop() if spots else self._spot_for_file(who, path, given, stored.size, parents)
            change, made = self._put_change(spot, path, stored, at)
            return self._batch(who, spot._replace(guards=spot.guards + still_stored(stored.relied)), "write",
                               name_written(path[:-1] + (change.after.name,), spot.node), [*made, change], self._store_rows(stored))

        batch = self.db.write(attempt)
        change = batch.changes[-1]
        return change.after._replace(since=batch.seq, rev=batch.seq), change.before is None

    def _spot_for_file(self, who: Principal, path: tuple[str, ...], given: Preconditions, size: int,
                       parents: bool) -> Spot:
        """Where a file of `size` bytes may be written, everything checked."""
        spot = self._spot(who, path)
        if given.beside and spot.node:
            spot = self._spot(who, path[:-1] + (self._free_name(spot.parent, path[-1]),))
        self._check_place(spot, path, parents)
        if spot.node and spot.node.kind:
            raise CloudError("conflict", "a collection is at this path")
        spot = self._admit(who, spot, path, given)
        self._check_space(spot, size - (spot.node.size if spot.node else 0), size)
        return spot

    def _check_place(self, spot: Spot, path: tuple[str, ...], parents: bool = False) -> None:
        """Refuse a path at which nothing can be."""
        if not spot.open:
            raise CloudError("conflict", "a file is in the way")
        if spot.node is None:
            if len(spot.rest) > 1 and not parents:
                raise CloudError("no-parent", "the collection %s does not exist" % "/".join(path[:-1]))
            if len(spot.chain) - 1 + len(spot.rest) > DEPTH_LIMIT:
                raise CloudError("bad-request", "over %d levels deep" % DEPTH_LIMIT)
            if self.config.windows_names == "refuse":
                self._check_windows(spot, path)

    def _check_windows(self, spot: Spot, path: tuple[str, ...]) -> None:
        """Refuse names Windows cannot hold beside what is there (P11)."""
        name = spot.rest[0]
        if not all(map(is_windows_name, spot.rest)):
            raise CloudError("conflict", "Windows cannot hold the name %s" % name)
        for (other,) in self.db.read("SELECT name FROM entry WHERE parent = ? AND until IS NULL", (spot.parent,)):
            if other.casefold() == name.casefold():
                raise CloudError("conflict", "%s is there, and Windows cannot tell the two apart" % other)

    def _put_change(self, spot: Spot, path: tuple[str, ...], stored: Stored, mtime: int) -> tuple[Change, list[Change]]:
        """The change that puts stored bytes at a spot, and those that make the collections it lacks."""
        made, chain = self._make_parents(spot)
        if spot.node:
            media = media_type(spot.node.name, stored.head)
            after = spot.node._replace(manifest=stored.manifest, size=stored.size, mtime=mtime, media=media, rev=0)
        else:
            after = Node(self.db.new_id(), spot.home, 0, None, chain[-1], spot.rest[-1], FILE, stored.manifest, stored.size,
                         mtime, media_type(spot.rest[-1], stored.head), 0, None)
        return Change(spot.node, after, chain, chain), made

    def _make_parents(self, spot: Spot) -> tuple[list[Change], tuple[int, ...]]:
        """Changes that make the collections a spot lacks above its last name; and the chain with them."""
        made, chain = [], spot.chain
        for name in spot.rest[:-1]:
            made.append(Change(None, self._new_collection(spot.home, chain[-1], name), (), chain))
            chain += (made[-1].after.node,)
        return made, chain

    def _new_collection(self, home: int, parent: int, name: str) -> Node:
        return Node(self.db.new_id(), home, 0, None, parent, name, COLLECTION, None, 0, self.clock.wall(), None, 0, None,
                    0, 0)

    def _knows(self, home: int, hash: str) -> bool:
        """Does this home refer to a chunk already, so that telling its owner so betrays nothing? (D3)"""
        return bool(self.db.read(
            "SELECT 1 FROM chunk h WHERE h.hash = :hash AND h.bad IS NULL AND h.condemned IS NULL AND (EXISTS ("
            "SELECT 1 FROM entry WHERE manifest = :hash AND home = :home) OR EXISTS ("
            "SELECT 1 FROM manifest_chunk m JOIN entry e ON e.manifest = m.manifest WHERE m.chunk = :hash AND e.home = :home))",
            {"hash": hash, "home": home}))

    def _store_rows(self, stored: Stored, *, new: bool = True) -> list[Statement]:
        """Rows that make stored bytes known: the chunks, if they are new, and the manifest if there are several."""
        body = [Statement(CHUNK_ROWS, self._chunk_rows(stored), many=True)] if new else []
        if len(stored.chunks) > 1:
            body += [Statement("INSERT OR IGNORE INTO manifest VALUES (?, ?, ?)",
                               (stored.manifest, stored.size, stored.sha256)),
                     Statement("INSERT OR IGNORE INTO manifest_chunk VALUES (?, ?, ?)", Rows(partial(self._offsets, stored)),
                               many=True)]
        if stored.digests:
            body.append(Statement("INSERT OR IGNORE INTO digest VALUES (?, ?, ?)",
                                  [(stored.manifest, kind, value) for kind, value in stored.digests.items()], many=True))
        return body

    def _chunk_rows(self, stored: Stored) -> list[tuple[Any, ...]]:
        now = self.clock.due()
        if stored.inline is not None:
            return [(stored.manifest, stored.size, None, now, stored.inline)]
        return [(hash, size, "%s-%s" % (hash, stored.tag), now, None) for hash, size in dict(stored.chunks).items()
                if hash not in stored.relied]

    def _offsets(self, stored: Stored) -> Iterator[tuple[str, int, str]]:
        offset = 0
        for hash, size in stored.chunks:
            yield stored.manifest, offset, hash
            offset += size

    def make_collection(self, who: Principal, path: tuple[str, ...], given: Preconditions = ANY, *,
                        parents: bool = False, properties: dict[str, str] | None = None) -> Node:
        """Make an empty collection, with dead properties if some are given.  raises CloudError exists, no-parent, conflict, locked"""
        self._require(who)

        def attempt() -> Batch:
            spot = self._spot(who, path)
            self._check_place(spot, path, parents)
            if spot.node:
                raise CloudError("exists", "there is something at this path already")
            spot = self._admit(who, spot, path, given)
            self._check_space(spot, 0, 1)
            made, chain = self._make_parents(spot)
            node = self._new_collection(spot.home, chain[-1], path[-1])
            self._check_properties(node, properties or {})
            return self._batch(who, spot, "make-collection", {"path": "/".join(path)}, [*made, Change(None, node, (), chain)],
                               self._property_rows(node, properties or {}))

        batch = self.db.write(attempt)
        return batch.changes[-1].after._replace(since=batch.seq, rev=batch.seq, seq=batch.seq)

    def delete(self, who: Principal, *paths: tuple[str, ...], given: Preconditions = ANY) -> int:
        """Move nodes to the trash, in one step; returns its seq.  raises CloudError not-found, forbidden, locked"""
        self._require(who)

        def attempt() -> Batch:
            spots = [self._admit_removal(who, self._spot(who, path), path, given) for path in outermost(paths)]
            changes = [self._removal(spot.node, spot) for spot in spots]
            return self._batch(who, together(spots), "delete", name_paths(paths), changes,
                               self._drop_locks(spots[0], *(change.before for change in changes)))

        return self.db.write(attempt).seq

    def _admit_removal(self, who: Principal, spot: Spot, path: tuple[str, ...], given: Preconditions) -> Spot:
        """What must hold for a node to leave its place; returns the spot with the guards that restate it."""
        self._found(spot)
        if not path:
            raise CloudError("forbidden", "the root stays where it is")
        spot = self._check_conditions(who, spot, path, given)
        if spot.locked:
            self._check_locks(who, spot, given, below=True, member=True)
        return spot

    def _removal(self, node: Node, spot: Spot) -> Change:
        return Change(node, None, spot.chain, (), "deleted")

    # ---- moving and copying

    def move(self, who: Principal, *pairs: tuple[tuple[str, ...], tuple[str, ...]], given: Preconditions = ANY,
             clash: str | Sequence[str] = "replace") -> list[tuple[Node, bool]]:
        """Give nodes other places and names, in one step; returns each and whether nothing was there before.

        pairs    (source, target) paths
        clash    what to do if something is at a target: "replace" puts it into the trash, "keep" takes a free name
                 like "a (2).txt", "refuse" raises; for all of them, or for each
        raises   CloudError not-found, no-parent, same-place, precondition-failed, locked

        Ids, versions and the ETags of files stay.
        """
        self._require(who)
        check_disjoint(pairs)

        def attempt() -> Batch:
            changes, spots, taken = [], [], set()
            for (source, target), how in zip(pairs, for_each(clash, pairs)):
                here = self._admit_removal(who, self._spot(who, source), source, given)
                there, target, removal = self._make_room(who, here.node, source, target, given, how, taken)
                after = here.node._replace(parent=there.parent, name=target[-1])
                changes += [*removal, Change(here.node, after, here.chain, there.chain, "moved")]
                spots.append(here)
            return self._batch(who, together(spots), "move", {**name_paths([p[0] for p in pairs]), "to": "/".join(pairs[0][1])},
                               changes, self._drop_locks(spots[0], *(change.before for change in changes)))

        return self._arrivals(self.db.write(attempt))

    def _arrivals(self, batch: Batch) -> list[tuple[Node, bool]]:
        """What a batch brought to new places, and whether each place was free."""
        found, free = [], True
        for change in batch.changes:
            if change.after:
                found.append((change.after._replace(since=batch.seq, rev=change.after.rev or batch.seq), free))
            free = bool(change.after)
        return found

    def _make_room(self, who: Principal, node: Node, source: tuple[str, ...], target: tuple[str, ...], given: Preconditions,
                   clash: str, taken: set[tuple[int, str]]) -> tuple[Spot, tuple[str, ...], list[Change]]:
        """Check that a node may come to a place, or find one beside it; and the change that removes what is there.

        taken    places that this batch has given away: (parent, key)
        """
        ours, theirs = list(map(key_of, source)), list(map(key_of, target))
        if not target or source == target or ours[:len(theirs)] == theirs != ours or theirs[:len(ours)] == ours != theirs:
            raise CloudError("same-place", "one of the two places is, or lies in, the other")
        there = self._spot(who, target)
        self._check_place(there, target)
        other = there.node if there.node and there.node.node != node.node else None      # not just another form of the name
        if clash == "keep" and (other or (there.parent, key_of(target[-1])) in taken):
            target = target[:-1] + (self._free_name(there.parent, target[-1], taken),)
            there, other = self._spot(who, target), None
        taken.add((there.parent, key_of(target[-1])))
        if there.locked:
            self._check_locks(who, there, given, below=True, member=True)
        if other and clash != "replace":
            raise CloudError("precondition-failed", "there is something at the destination")
        return there, target, [self._removal(other, there)] if other else []

    def _free_name(self, parent: int, name: str, taken: Container[tuple[int, str]] = ()) -> str:
        """A name like this one that nothing in a collection has: "a (2).txt"."""
        stem, dot, suffix = name.rpartition(".")
        if not stem or len(suffix) > 16:
            stem, dot, suffix = name, "", ""
        for count in range(2, 10_000):
            mark = " (%d)%s%s" % (count, dot, suffix)
            found = cut_text(stem, NAME_LIMIT - len(mark.encode())) + mark
            if (parent, key_of(found)) not in taken and not self.db.read(
                    "SELECT 1 FROM entry WHERE parent = ? AND key = ? AND until IS NULL", (parent, key_of(found))):
                return found
        raise CloudError("conflict", "there are 10000 of that name")

    def _drop_locks(self, spot: Spot, *nodes: Node) -> list[Statement]:
        """Locks do not outlive the place of a node (RFC 4918 s7.5, s9.6.1)."""
        if not spot.locked:
            return []
        gone = {node.node for node in nodes}
        return [Statement("DELETE FROM lock WHERE token = ?", (lock.token,)) for lock in self._locks(spot)
                if lock.node in gone or gone & set(self._above_or_none(lock.node))]

    def copy(self, who: Principal, *pairs: tuple[tuple[str, ...], tuple[str, ...]], given: Preconditions = ANY,
             clash: str | Sequence[str] = "replace", deep: bool = True, alive: Callable[[], None] = unwatched) -> list[tuple[Node, bool]]:
        """Make second nodes with the same content; of a collection with all below it, unless `deep` is False.

        No byte moves: the copies refer to the same manifests.  Otherwise as move; raises also over-quota, too-many
        """
        self._require(who)
        detail = {**name_paths([source for source, _ in pairs]), "to": "/".join(pairs[0][1])}

        def attempt() -> Batch:
            changes, extra, spots, taken, growth = [], list(below), [], set(), 0
            for (source, target), how, node, top in zip(pairs, for_each(clash, pairs), nodes, tops):
                here = self._check_conditions(who, self._spot(who, source), source, given)
                spots.append(here)
                if self._found(here).node != node.node:
                    raise CloudError("conflict", "something else is there by now")
                if source == target and how == "keep":
                    target = target[:-1] + (self._free_name(here.parent, target[-1], taken),)
                there, target, removal = self._make_room(who, here.node, source, target, given, how, taken)
                if there.node and there.node.node == node.node:
                    raise CloudError("same-place", "source and destination are one")
                growth += top.size - sum(change.before.size for change in removal)
                self._check_space(there, growth, 1)
                changes += [*removal, Change(None, top._replace(parent=there.parent, name=target[-1]), (), there.chain)]
                extra += self._drop_locks(there, *(change.before for change in removal))
            return self._batch(who, together(spots), "copy", detail, changes, extra)

        with self._heavy(who):
            nodes, copies = [self.stat(who, source) for source, _ in pairs], Copies(self.db, who.account)
            tops, below = [copies.measure(node, deep) for node in nodes], ()
            if copies.rows <= COPY_STEP:
                below = copies.statements()
            else:
                attempt()                                    # whatever can be refused now is
                below = copies.write_below(who, tops, detail, alive)
            return self._arrivals(self.db.write(attempt))

    def taken(self, who: Principal, *paths: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Those of some paths at which there is something."""
        return [path for path in paths if self.find(who, path)]

    def _heavy(self, who: Principal) -> ContextManager[None]:
        """A lane for long work, some at a time for each account (Q3)."""
        return self._lanes.of(who.account)

    # ---- properties

    def patch(self, who: Principal, path: tuple[str, ...], given: Preconditions = ANY, *,
              properties: dict[str, str | None] | None = None, mtime: int | None = None) -> Node:
        """Set or remove (None) dead properties, and the time of a node, in one step.

        properties   {"{namespace}name": XML of the whole element}
        """
        self._require(who)

        def attempt() -> Batch:
            spot = self._spot(who, path)
            node = self._found(spot)
            spot = self._admit(who, spot, path, given)
            self._check_properties(node, properties or {})
            changes = [] if mtime in (None, node.mtime) else [
                Change(node, node._replace(mtime=mtime, rev=0), spot.chain, spot.chain)]
            return self._batch(who, spot, "patch", {"path": "/".join(path)}, changes,
                               self._property_rows(node, properties or {}))

        self.db.write(attempt)
        return self.stat(who, path)

    def _property_rows(self, node: Node, properties: dict[str, str | None]) -> list[Statement]:
        return [Statement("DELETE FROM property WHERE node = ? AND name = ?", (node.node, name)) if value is None else
                Statement("INSERT OR REPLACE INTO property VALUES (?, ?, ?)", (node.node, name, value))
                for name, value in properties.items()]

    def _check_properties(self, node: Node, properties: dict[str, str | None]) -> None:
        """raises CloudError too-large beyond what a node may hold (X4)"""
        rows = dict(self.db.read("SELECT name, length(name) + length(value) FROM property WHERE node = ?", (node.node,)))
        rows.update((name, len(name) + len(value or "")) for name, value in properties.items())
        if any(size > PROPERTY_LIMIT for size in rows.values()) or sum(rows.values()) > 16 * PROPERTY_LIMIT:
            raise CloudError("too-large", "properties may have %s each" % format_size(PROPERTY_LIMIT))

    # ---- locks (RFC 4918 s6, s7)

    def lock(self, who: Principal, path: tuple[str, ...], given: Preconditions = ANY, *, deep: bool, exclusive: bool,
             owner: str, seconds: int) -> tuple[Lock, bool]:
        """Lock a node, making an empty file if nothing is there; returns the lock and whether it is new.

        raises  CloudError lock-conflict, no-parent, precondition-failed
        """
        self._require(who)
        empty = self.blobs.put(Body(b""), lambda hash: False)

        def attempt() -> Batch:
            spot = self._spot(who, path)
            self._check_place(spot, path)
            spot = self._check_conditions(who, spot, path, given)
            if spot.locked:
                self._check_lock_conflict(who, spot, exclusive, deep)
            node, changes = spot.node, []
            if node is None:
                if spot.locked:
                    self._check_locks(who, spot, given)
                self._check_space(spot, 0, 1)
                changes = [self._put_change(spot, path, empty, self.clock.wall())[0]]
                node = changes[0].after
            now = self.clock.due()
            granted.append(Lock(new_lock_token(), spot.home, node.node, who.account, deep, exclusive, owner,
                                seconds, now + seconds * 1000))
            return self._batch(who, spot, "lock", {"path": "/".join(path)}, changes, [
                *(self._store_rows(empty) if changes else ()),
                Statement("DELETE FROM lock WHERE home = ? AND due <= ?", (spot.home, now)),
                Statement("INSERT INTO lock VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", granted[-1]),
                raise_shape(spot.home)])

        granted: list[Lock] = []
        batch = self.db.write(attempt)
        return granted[-1], bool(batch.changes)

    def _check_lock_conflict(self, who: Principal, spot: Spot, exclusive: bool, deep: bool) -> None:
        locks = self._locks(spot)
        near = self._covering(spot, locks)
        if deep and spot.node:
            near += [lock for lock in locks if spot.node.node in self._above_or_none(lock.node)]
        for lock in near:
            if exclusive or lock.exclusive:
                raise CloudError("lock-conflict", "it is locked", path=self._path_or_none(who, lock.node))
        if len(locks) >= 10_000:
            raise CloudError("busy", "this account has 10000 locks")

    def refresh(self, who: Principal, path: tuple[str, ...], tokens: frozenset[str], seconds: int) -> Lock:
        """Start the time of a lock anew.  raises CloudError precondition-failed if none of the tokens holds the node"""
        fresh: list[Lock] = []

        def attempt() -> Batch:
            spot = self._spot(who, path)
            lock = next((lock for lock in self._covering(spot, self._locks(spot))
                         if lock.token in tokens and lock.account == who.account), None)
            if lock is None:
                raise CloudError("precondition-failed", "there is no such lock on this")
            fresh[:] = [lock._replace(seconds=seconds, due=self.clock.due() + seconds * 1000)]
            return Batch([Statement("UPDATE lock SET seconds = ?, due = ? WHERE token = ?", (seconds, fresh[0].due, lock.token))],
                         [Statement("SELECT 'lock' WHERE NOT EXISTS (SELECT 1 FROM lock WHERE token = ?)", (lock.token,))])

        self.db.write(attempt)
        return fresh[0]

    def unlock(self, who: Principal, path: tuple[str, ...], token: str) -> None:
        """End a lock.  raises CloudError no-token if it does not hold the node, forbidden if it is another's"""
        self._require(who)
        spot = self._spot(who, path)
        self._found(spot)
        for lock in self._covering(spot, self._locks(spot)):
            if lock.token == token:
                if lock.account != who.account and not who.admin:
                    raise CloudError("forbidden", "this lock belongs to somebody else")
                self.db.run(Statement("DELETE FROM lock WHERE token = ?", (token,)))
                return
        raise CloudError("no-token", "there is no such lock on this")

    def quota(self, who: Principal) -> tuple[int, int | None]:
        """(bytes used, bytes left): of the quota, or of the disk where there is none."""
        spot = self._spot(who, ())
        free = shutil.disk_usage(self.config.data).free
        return spot.used, free if spot.quota is None else max(0, min(free, spot.quota - spot.used - self._reserved(spot.home)))

    def usage(self, who: Principal) -> tuple[dict[str, list[int]], int, int]:
        """({kind: [bytes, files]} of what is live, bytes of other versions, bytes in the trash) of a whole account."""
        self._require_whole(who)
        kinds: dict[str, list[int]] = {}
        with self._heavy(who):
            for media, size, files in self.db.each(
                    "WITH RECURSIVE live (node) AS (SELECT ? UNION ALL SELECT e.node FROM live JOIN entry e ON e.parent = live.node "
                    "AND e.until IS NULL AND e.kind = 1) SELECT e.media, sum(e.size), count(*) FROM live JOIN entry e "
                    "ON e.parent = live.node AND e.until IS NULL AND e.kind = 0 GROUP BY e.media", (who.root,)):
                sums = kinds.setdefault(kind_of_media(media), [0, 0])
                sums[0], sums[1] = sums[0] + size, sums[1] + files
            (versions,), = self.db.read(
                "SELECT coalesce(sum(size), 0) FROM (SELECT DISTINCT manifest, size FROM entry e WHERE home = ? AND fate = 'replaced' "
                "AND kind = 0 AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.manifest = e.manifest AND l.home = e.home "
                "AND l.until IS NULL))", (who.account,))
            (trash,), = self.db.read(
                "SELECT coalesce(sum(CASE WHEN e.kind THEN c.size ELSE e.size END), 0) FROM entry e LEFT JOIN collection c "
                "ON c.node = e.node WHERE e.home = ? AND e.fate = 'deleted' "
                "AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = e.node AND l.until IS NULL)", (who.account,))
        return kinds, versions, trash

    # ---- the brake: a device that destroys much in little time is held until somebody looks

    def _brake(self, who: Principal, destroyed: Iterable[tuple[Node, Node | None]]) -> list[Statement]:
        """Count what a device deletes and overwrites; returns the statement that notes it.  raises CloudError held

        destroyed   (what was, what takes its place or None), whichever verb does it
        What it made itself within the window does not count, nor does a file that it overwrites once more.
        """
        recent = self.clock.wall() - BRAKE_WINDOW
        gone = [(before, after) for before, after in destroyed if before.created < recent]
        deletes = sum(before.files if before.kind else 1 for before, after in gone if after is None)
        overwrites = sum(before.kind == FILE and after.manifest != before.manifest for before, after in gone if after)
        if not deletes + overwrites:
            return []
        now, brake = self.clock.due(), self._brake_of(who)
        if brake and brake.free > now:
            return []
        if brake and brake.held is None and brake.due > now:
            note = Statement("UPDATE brake SET deletes = deletes + ?, overwrites = overwrites + ? WHERE device = ?",
                             (deletes, overwrites, who.device))
        else:
            seq, files = self.db.read("SELECT (SELECT max(seq) FROM journal), c.files FROM account a JOIN collection c "
                                      "ON c.node = a.root WHERE a.id = ?", (who.account,))[0]
            brake = brake if brake and brake.held is not None else Brake(
                who.device, who.account, seq, now + BRAKE_WINDOW, files, 0, 0, None, 0)
            note = Statement("INSERT OR REPLACE INTO brake VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                             brake._replace(deletes=deletes, overwrites=overwrites))
        self._check_brake(who, brake, deletes, overwrites)
        return [note]

    def _brake_of(self, who: Principal) -> Brake | None:
        rows = self.db.read("SELECT * FROM brake WHERE device = ?", (who.device,))
        return Brake._make(rows[0]) if rows else None

    def _check_brake(self, who: Principal, brake: Brake, deletes: int, overwrites: int) -> None:
        """raises CloudError held if this would be too much, or something was before"""
        def is_too_much() -> bool:
            count = deletes + overwrites + brake.deletes + brake.overwrites
            return count > BRAKE_FILES and count * BRAKE_SHARE > brake.files

        if brake.held is None and is_too_much():
            (files,), = self.db.read(
                "SELECT count(DISTINCT e.node) FROM journal j JOIN entry e ON e.home = j.home AND e.until = j.seq "
                "WHERE j.home = ? AND j.seq > ? AND j.device = ? AND e.fate = 'replaced'", (who.account, brake.seq, who.device))
            brake = brake._replace(overwrites=min(files, brake.overwrites))
            if not is_too_much():
                self.db.run(Statement("UPDATE brake SET overwrites = ? WHERE device = ?", (files, who.device)))
                return
            held = brake._replace(deletes=brake.deletes + deletes, overwrites=brake.overwrites + overwrites,
                                  held=self.clock.wall())
            self.db.write(lambda: Batch([Statement("INSERT OR REPLACE INTO brake VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", held)],
                                        line=Line(who.account, who, "hold", {"count": held.deletes + held.overwrites})))
            log.warning("a device is held by the brake", extra={"account": who.name, "by": who.device})
            brake = held
        if brake.held is not None:
            raise CloudError("held", "this device deletes or overwrites so much that it is held; allow or undo it on the page")

    # ---- the one way into the tree

    def _batch(self, who: Principal, spot: Spot, action: str, detail: dict[str, Any], changes: Sequence[Change],
               extra: Sequence[Statement] = (), credit: int = 0, sums: dict[int, list[int]] | None = None) -> Batch:
        """Turn changes, decided at a spot, into a batch (invariants 3 to 5).

        credit  bytes of growth that were reserved before
        sums    {collection: [bytes, files]} if they were added up already; the changes then name no collections
        """
        guards = [Statement("SELECT 'shape' WHERE (SELECT shape FROM account WHERE id = ?) IS NOT ?",
                            (spot.home, spot.shape)), *spot.guards]
        ends, begins, sums = [], [], {} if sums is None else sums
        growth, loose = -credit, False
        for change in changes:
            before, after = change.before, change.after
            if before:
                guards.append(still_there(before))
                ends.append((change.fate, before.home, before.since, before.node))
                loose |= bool(before.kind) and (after is None or (after.parent, after.name) != (before.parent, before.name))
                if before.kind and (after is None or after.parent != before.parent):     # its sums leave the chain with it
                    guards.append(Statement("SELECT 'sums' FROM collection WHERE node = ? AND (size, files) <> (?, ?)",
                                            (before.node, before.size, before.files)))
                self._count(sums, change.left, -before.size, -(before.files if before.kind else 1))
                growth -= before.size
            if after:
                begins.append((after.home, after.node, after.parent, after.name, key_of(after.name), after.kind,
                               after.manifest, 0 if after.kind else after.size, after.mtime, after.media, after.rev or None))
                self._count(sums, change.joined, after.size, after.files if after.kind else 1)
                growth += after.size
        if spot.quota is not None and growth > 0:
            guards.append(Statement(
                "SELECT 'quota' FROM account a JOIN collection r ON r.node = a.root WHERE a.id = ? AND a.quota IS NOT NULL "
                "AND r.size + ? + (SELECT " + RESERVED + " FROM upload WHERE home = a.id AND done IS NULL) > a.quota",
                (spot.home, growth)))
        body = [*extra]
        if ends and who.means == "token":
            body += self._brake(who, [(change.before, change.after) for change in changes if change.before])
        if ends:
            body.append(Statement("UPDATE entry SET until = (SELECT max(seq) FROM journal), fate = ? "
                                  "WHERE home = ? AND since = ? AND node = ?", ends, many=True))
        if begins:
            body.append(Statement(
                "INSERT INTO entry (home, since, node, parent, name, key, kind, manifest, size, mtime, media, rev) "
                "SELECT ?, s, ?, ?, ?, ?, ?, ?, ?, ?, ?, coalesce(?, s) FROM (SELECT max(seq) AS s FROM journal)",
                begins, many=True))
        new = [(change.after.node,) for change in changes if change.after and change.after.kind and not change.before]
        if new:
            body.append(Statement("INSERT OR IGNORE INTO collection SELECT ?, max(seq), 0, 0 FROM journal", new, many=True))
        body.append(Statement("UPDATE collection SET seq = (SELECT max(seq) FROM journal), size = size + ?, files = files + ? "
                              "WHERE node = ?", [(*sum, node) for node, sum in sums.items()], many=True))
        if loose:
            body.append(raise_shape(spot.home))
        return Batch(body, list(dict.fromkeys(guards)), Line(spot.home, who, action, detail), changes=changes, op=self.op,
                     frees=not begins)

    def _count(self, sums: dict[int, list[int]], chain: tuple[int, ...], size: int, files: int) -> None:
        for node in chain:
            sum = sums.setdefault(node, [0, 0])
            sum[0] += size
            sum[1] += files


def unchanged(spot: Spot) -> Statement:
    """The guard that says: what is at a spot, or that nothing is, is as it was when somebody looked."""
    node = spot.node
    if node is None:
        return Statement("SELECT 'changed' FROM entry WHERE parent = ? AND key = ? AND until IS NULL",
                         (spot.parent, key_of(spot.rest[0])))
    if node.kind:
        return Statement("SELECT 'changed' WHERE NOT EXISTS (SELECT 1 FROM collection WHERE node = ? AND seq = ?)", (node.node, node.seq))
    return still_there(node)


def still_there(node: Node) -> Statement:
    """The guard that says: this very entry is what the node is now."""
    return Statement("SELECT 'changed' WHERE NOT EXISTS (SELECT 1 FROM entry WHERE home = ? AND since = ? AND node = ? "
                     "AND until IS NULL)", (node.home, node.since, node.node))


def check_presence(data: Path, how: str) -> None:
    """Is there a cloud in a directory, or, to make one, nothing of another?  raises CloudError

    A database that was lost must never look like a cloud without files: clients would believe it, backups would be
    brought up to date with it, and its objects would be swept.
    """
    if (data / "cloud.db").exists() and (data / "cloud.db").stat().st_size:
        return
    left = [name for name in ("cloud.db-wal", "reserve") if (data / name).exists()] + [
        "objects" for shard in (data / "objects").glob("??") if any(shard.iterdir())][:1] + [
        file.name for file in data.glob("cloud-version-*.db")]
    if left:
        raise CloudError("conflict", "%s holds %s but no database (cloud.db): restore a backup into another directory" % (data, left[0]))
    if how != "make":
        raise CloudError("not-found", "%s holds no cloud; give the right --data" % data)


def still_stored(hashes: Sequence[str]) -> tuple[Statement, ...]:
    """The guards that say: chunks that were found stored, and so were not stored again, are there and whole."""
    return tuple(Statement("SELECT 'chunk' WHERE (SELECT count(*) FROM chunk WHERE hash IN (" + marks(piece) + ") AND bad IS NULL) <> ?",
                           (*piece, len(piece))) for piece in pieces(hashes))


def raise_shape(home: int) -> Statement:
    """Whatever was decided about paths, locks or history of a home before this is decided anew (invariant 5)."""
    return Statement("UPDATE account SET shape = shape + 1 WHERE id = ?", (home,))


def give_up(rows: Sequence[tuple[int, int, int]]) -> list[Statement]:
    """Mark deleted entries (home, since, node) as given up for good: only the last of what a node was, and none that is back."""
    return [Statement("UPDATE entry SET fate = 'purged' WHERE home = ? AND since = ? AND node = ? AND fate = 'deleted' AND "
                      + IS_LAST, rows, many=True)]


IS_GIVEN_UP = (  # was the collection that an entry hangs in given up?
    "EXISTS (SELECT 1 FROM entry g WHERE g.node = entry.parent AND g.fate = 'purged') "
    "AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = entry.parent AND l.until IS NULL)")
IS_LAST = (  # is an entry the last that its node had, and the node not live?
    "NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = entry.node AND l.until IS NULL) "
    "AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = entry.node AND l.since >= entry.until AND l.until IS NOT NULL)")


def new_lock_token() -> str:
    """A random UUID as a URI (RFC 4918 s6.5)."""
    digits = secrets.token_hex(16)
    return "urn:uuid:%s-%s-4%s-a%s-%s" % (digits[:8], digits[8:12], digits[13:16], digits[17:20], digits[20:])


def together(spots: Sequence[Spot]) -> Spot:
    """The first of several spots, with the guards of them all."""
    return spots[0]._replace(guards=tuple(guard for spot in spots for guard in spot.guards))


def outermost(paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without those that lie below another of them, each once."""
    found: list[tuple[str, ...]] = []
    for path in sorted(set(paths)):
        if not found or path[:len(found[-1])] != found[-1]:
            found.append(path)
    if not found:
        raise CloudError("bad-request", "nothing was named")
    return found


def for_each(value: str | Sequence[str], things: Sequence[Any]) -> Sequence[str]:
    """One value for all things, or a value for each."""
    return [value] * len(things) if isinstance(value, str) else value


def check_disjoint(pairs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
    """Refuse moves in one step of which one lies in another's way."""
    sources = [source for source, _ in pairs]
    if len(outermost(sources)) != len(sources) or any(
            target[:len(source)] == source for source in sources for _, target in pairs):
        raise CloudError("same-place", "one of the places is, or lies in, another")


def name_paths(paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """What the journal says of them."""
    return {"path": "/".join(paths[0]), **({"count": len(paths)} if len(paths) > 1 else {})}


def name_written(path: tuple[str, ...], before: Node | None) -> dict[str, Any]:
    """What the journal says of a file that is written: where it is, and whether it is new there."""
    return {"path": "/".join(path), **({} if before else {"new": True})}


def cut_text(text: str, size: int) -> str:
    """The beginning of a text that fits into `size` bytes of UTF-8."""
    return text.encode()[:size].decode("utf-8", "ignore")


UNPURGED = " AND NOT EXISTS (SELECT 1 FROM entry g WHERE g.node = e.node AND g.fate = 'purged')"      # of an ended entry e
CHILDREN_AT = (  # what a collection held as of a seq: :parent, :seq
    "SELECT node, kind, name, key, manifest, size, mtime, media FROM entry WHERE parent = :parent AND until IS NULL AND since <= :seq "
    "UNION ALL SELECT node, kind, name, key, manifest, size, mtime, media FROM entry e "
    "WHERE parent = :parent AND until > :seq AND since <= :seq" + UNPURGED)


@dataclass(eq=False)
class CopiedCollection:
    """One of the collections of a copy."""
    node: int
    copy: int
    above: CopiedCollection | None = None
    count: int = 0                               # files that it holds itself
    first: int = 0                               # id of the copy of the first of them, in the order of keys
    size: int = 0                                # bytes and
    files: int = 0                               # files in it and below
    below: list[tuple[int, str, str, int]] = field(default_factory=list)     # (copy, name, key, mtime) of collections that it holds


class Copies:
    """Copies of trees as of one moment: ids and sums are worked out beforehand, rows are made inside the database.

    Only collections are held in memory.  A small copy is part of its batch.  A large one is written before, some
    thousand rows a batch, below tops that do not exist yet, so that nobody waits long for the writer; the last batch
    brings the tops.  What is left of one that broke off hangs under nothing; Upkeep finds it by `growing`.
    """

    def __init__(self, db: Database, home: int) -> None:
        self.db, self.home, self.rows = db, home, 0
        self.seq = db.read("SELECT max(seq) FROM journal")[0][0]
        self._parts: list[CopiedCollection] = []             # each before those that it holds
        self._pairs: list[tuple[int, int]] = []              # (node, copy) of tops and collections, for properties
        self._has_properties = bool(db.read("SELECT 1 FROM property LIMIT 1"))

    def measure(self, node: Node, deep: bool) -> Node:
        """Take up a copy of a node and, if it is `deep`, of all below it; returns its top.  raises CloudError too-many"""
        top = node._replace(node=self.db.new_id(), rev=0)
        self._pairs.append((node.node, top.node))
        if not node.kind:
            return top
        found = self._measure(node.node, top.node, deep)
        return top._replace(size=found.size, files=found.files)

    def _measure(self, node: int, copy: int, deep: bool) -> CopiedCollection:
        """Find the collections below and sum up what they hold, without recursion."""
        order = [CopiedCollection(node, copy)]
        for one in order if deep else ():
            where = {"parent": one.node, "seq": self.seq}
            (one.count, one.size), = self.db.read("SELECT count(*), coalesce(sum(size), 0) FROM (" + CHILDREN_AT + ") WHERE kind = 0", where)
            one.files, one.first = one.count, self.db.new_ids(one.count)
            for child, *about in self.db.read("SELECT node, name, key, mtime FROM (" + CHILDREN_AT + ") WHERE kind = 1", where):
                order.append(CopiedCollection(child, self.db.new_id(), one))
                one.below.append((order[-1].copy, *about))
                self._pairs.append((child, order[-1].copy))
            self.rows += one.count + len(one.below)
            if self.rows > COPY_LIMIT:
                raise CloudError("too-many", "a copy may have %d files; copy parts" % COPY_LIMIT)
        for one in reversed(order[1:]):
            one.above.size, one.above.files = one.above.size + one.size, one.above.files + one.files
        self._parts += order
        return order[0]

    def statements(self) -> list[Statement]:
        """All rows but the entries of the tops, which the batch is about."""
        return [*(statement for one in self._parts for body in self._steps(one, None, one.count) for statement in body),
                *self._sums(self._parts, None), *self._properties()]

    def write_below(self, who: Principal, tops: Sequence[Node], detail: dict[str, Any], alive: Callable[[], None]) -> list[Statement]:
        """Write all that below tops which are not there yet; returns what the batch that brings them has to add.

        raises  CloudError conflict if what is copied was given up meanwhile; what `alive` raises
        """
        growing = [(top.node, self.home, self.db.clock.due() + COPY_TIME) for top in tops]
        since = self.db.write(lambda: Batch([Statement("INSERT INTO growing (node, home, due) VALUES (?, ?, ?)", growing, many=True)],
                                            line=Line(self.home, who, "copy-begin", detail))).seq
        ours = Statement("SELECT 'growing' WHERE NOT EXISTS (SELECT 1 FROM growing WHERE node = ?)", growing[0][:1])
        whole: list[Statement] = []                          # guards: the collections that are done are as large as they were
        for some in self._batches(since):
            alive()
            self.db.write_once(Batch([statement for statements, _ in some for statement in statements], [ours, *whole]),
                               CloudError("conflict", "what is copied was given up meanwhile"))
            whole = [guard for _, guard in some if guard]
        return [Statement("DELETE FROM growing WHERE node = ?", [(top.node,) for top in tops], many=True)]

    def _batches(self, since: int) -> Iterator[list[tuple[list[Statement], Statement | None]]]:
        """All steps, gathered into batches of about COPY_STEP rows: [(statements, guard when a collection is done), ...]."""
        some, rows = [], 0
        for one in self._parts:
            guard = Statement("SELECT 'lost' WHERE (SELECT count(*) FROM entry WHERE parent = ? AND until IS NULL) <> ?",
                              (one.copy, one.count + len(one.below)))
            for statements in self._steps(one, since, COPY_STEP):
                some.append((statements, None))
                rows += min(COPY_STEP, max(one.count, len(one.below)))
                if rows >= COPY_STEP:
                    yield some
                    some, rows = [], 0
            some.append(([], guard))
        yield some
        for parts in pieces(self._parts[::-1], COPY_STEP):       # a sum after those that are in it
            yield [(self._sums(parts, since), None)]
        yield [(self._properties(), None)]

    def _steps(self, one: CopiedCollection, since: int | None, step: int) -> Iterator[list[Statement]]:
        """The entries of what a collection holds, so many at a time."""
        values = {"parent": one.node, "seq": self.seq, "home": self.home, "copy": one.copy, "since": since, "after": ""}
        for done in range(0, one.count, max(1, step)):
            piece = {**values, "first": one.first + (done << 12), "count": step}
            yield [Statement(COPY_FILES, piece), *([Statement(COPY_PROPERTIES, piece)] if self._has_properties else ())]
            for last, in self.db.read("SELECT key FROM (" + CHILDREN_AT + ") WHERE kind = 0 AND key > :after ORDER BY key LIMIT 1 OFFSET :step",
                                      {**values, "step": step - 1}) if done + step < one.count else ():
                values["after"] = last
        if one.below:
            yield [Statement("INSERT INTO entry (home, since, node, parent, name, key, kind, size, mtime, rev) SELECT ?1, coalesce(?2, s), ?3, ?4, "
                             "?5, ?6, 1, 0, ?7, coalesce(?2, s) FROM (SELECT max(seq) AS s FROM journal)",
                             [(self.home, since, copy, one.copy, name, key, mtime) for copy, name, key, mtime in one.below], many=True)]

    def _sums(self, parts: Sequence[CopiedCollection], since: int | None) -> list[Statement]:
        return [Statement("INSERT INTO collection (node, seq, size, files) SELECT ?1, coalesce(?2, max(seq)), ?3, ?4 FROM journal",
                          [(one.copy, since, one.size, one.files) for one in parts], many=True)]

    def _properties(self) -> list[Statement]:
        return [Statement("INSERT INTO property (node, name, value) SELECT ?2, name, value FROM property WHERE node = ?1", self._pairs,
                          many=True)] if self._has_properties else []


COPY_STEP = 2_000               # rows that a copy writes in one batch
COPY_TIME = HOUR                # a copy that takes longer was given up
COPIED = (  # the next files of a collection as of a seq, and the ids of their copies
    "SELECT *, :first + (row_number() OVER (ORDER BY key) - 1) * 4096 AS copy FROM (" + CHILDREN_AT + ") WHERE kind = 0 AND key > :after "
    "ORDER BY key LIMIT :count")
COPY_FILES = (
    "INSERT INTO entry (home, since, node, parent, name, key, kind, manifest, size, mtime, media, rev) SELECT :home, coalesce(:since, s), copy, "
    ":copy, name, key, kind, manifest, size, mtime, media, coalesce(:since, s) FROM (" + COPIED + "), (SELECT max(seq) AS s FROM journal)")
COPY_PROPERTIES = "INSERT INTO property (node, name, value) SELECT c.copy, p.name, p.value FROM (" + COPIED + ") c JOIN property p ON p.node = c.node"


class Rows:
    """Rows for many=True that are made anew each time a batch is tried."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


# ---- what was

class Version(NamedTuple):
    """A content that a file had, or has."""
    rev: int                     # names it: the seq of the batch that made it
    at: int
    size: int
    mtime: int
    manifest: str
    account: str                 # by whom
    device: str                  # with what
    name: str | None             # pinned under this name


class Trashed(NamedTuple):
    """A deleted node that can be restored."""
    node: Node
    at: int                      # when it was deleted
    account: str
    path: tuple[str, ...]        # where it was


class Step(NamedTuple):
    """A line of the journal."""
    seq: int
    at: int
    action: str
    detail: dict[str, Any]
    account: str
    device: str
    undoable: bool


class Difference(NamedTuple):
    """What became of a node between two moments, seen from a collection; None: not below it."""
    then: Node | None
    now: Node | None
    was: tuple[str, ...] | None
    path: tuple[str, ...] | None

    @property
    def how(self) -> str:
        """added, deleted, moved (and perhaps changed as well) or changed"""
        if self.then is None or self.now is None:
            return "added" if self.then is None else "deleted"
        return "changed" if self.was == self.path else "moved"


class Found(NamedTuple):
    """A hit of a search."""
    path: tuple[str, ...]
    node: Node
    snippet: tuple[str, str, str] | None         # (before, word, after), of a hit in the contents


def fits(query: Query, node: Node) -> bool:
    """Do kind, size and time of a node fit?  A collection has no size that anybody looks for."""
    sized = query.least is not None or query.most is not None
    return ((not query.kind or query.kind == kind_of_media(node.media))
            and not (sized and node.kind) and (query.least or 0) <= node.size <= (sys.maxsize if query.most is None else query.most)
            and (query.after is None or node.mtime >= query.after) and (query.before is None or node.mtime < query.before))


def match_words(word: str) -> str:
    """A word, or beginning of one, in the language of FTS5."""
    return '"%s"*' % spread(word).replace('"', '""')


STEP = (  # the columns of Step, and where they come from
    "j.seq, j.at, j.action, j.detail, coalesce(a.name, ''), coalesce(d.name, ''), "
    "EXISTS (SELECT 1 FROM entry WHERE home = j.home AND since = j.seq) OR EXISTS (SELECT 1 FROM entry WHERE home = j.home "
    "AND until = j.seq) FROM journal j LEFT JOIN account a ON a.id = j.account LEFT JOIN device d ON d.id = j.device")


class _Past:
    """The tree below a collection as of a seq, node by node.

    What was given up for good was never there: one purged entry hides all entries of its node.  Only the feed of
    changes sees it, to tell that it is gone (`purged`).
    """

    def __init__(self, read: Callable[..., Iterator[tuple[Any, ...]]], top: int, seq: int, *, purged: bool = False) -> None:
        self.read, self.top, self.seq, self.ended = read, top, seq, "" if purged else UNPURGED
        self._nodes: dict[int, Node | None] = {}
        self._paths: dict[int, tuple[str, ...] | None] = {top: ()}
        self._whole = self if purged else None           # this moment with what was given up

    def node(self, id: int) -> Node | None:
        """The node as it was; None if it was not, or not any more."""
        if id not in self._nodes:
            self._nodes[id] = next(self._rows("e.node = :id", {"id": id}), None)
        return self._nodes[id]

    def children(self, id: int) -> list[Node]:
        """What a collection held, in the order of names."""
        return sorted(self._rows("e.parent = :id", {"id": id}), key=lambda node: key_of(node.name))

    def child(self, id: int, key: str) -> Node | None:
        return next(self._rows("e.parent = :id AND e.key = :key", {"id": id, "key": key}), None)

    def _rows(self, where: str, params: dict[str, Any]) -> Iterator[Node]:
        return map(Node._make, self.read(
            "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node WHERE " + where
            + " AND e.until IS NULL AND e.since <= :seq UNION ALL "
            "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node WHERE " + where
            + " AND e.until > :seq AND e.since <= :seq" + self.ended, {**params, "seq": self.seq}))

    def would_come_along(self, then: _Past, id: int) -> bool:
        """Does it hang below a collection that was here `then`, though that is deleted or elsewhere by now?"""
        node = self.node(id)
        while node is not None and node.parent is not None:
            if then.here(node.parent):
                return True
            node = self.node(node.parent)
        return False

    def is_as(self, now: _Past, id: int) -> bool:
        """Is a node, now, where it was and what it was, though in another collection there, as that one is gone?"""
        one, other = self.here(id), now.here(id)
        return (bool(one and other) and self.path(id) == now.path(id) and not now.here(one.parent)
                and (one.manifest, one.mtime) == (other.manifest, other.mtime))

    def line(self, id: int | None) -> Iterator[int]:
        """A node and what held it, upwards, even if that hung nowhere."""
        while id is not None:
            yield id
            node = self.node(id)
            id = node.parent if node else None

    def touched_since(self, home: int, seq: int) -> list[int]:
        """Nodes of a home that batches after a seq touched."""
        return [id for (id,) in self.read("SELECT node FROM entry WHERE home = :home AND since > :seq "
                                          "UNION SELECT node FROM entry WHERE home = :home AND until > :seq",
                                          {"home": home, "seq": seq})]

    def path(self, id: int) -> tuple[str, ...] | None:
        """Where it was below the collection; None if elsewhere or nowhere."""
        walked = []
        while id not in self._paths:
            walked.append(id)
            node = self.node(id)
            if node is None or node.parent is None:
                self._paths[id] = None
            else:
                id = node.parent
        for id in reversed(walked):
            if id not in self._paths:
                node = self.node(id)
                above = self._paths[node.parent]
                self._paths[id] = None if above is None else above + (node.name,)
        return self._paths[walked[0] if walked else id]

    def here(self, id: int) -> Node | None:
        """The node if it was somewhere below the collection."""
        return None if self.path(id) is None else self.node(id)

    def is_lost(self, id: int) -> bool:
        """Was a node here that can never be brought back here: it, or what held it, was given up for good?"""
        self._whole = self._whole or _Past(self.read, self.top, self.seq, purged=True)
        return self.path(id) is None and self._whole.path(id) is not None


class Reversal:
    """Brings nodes back to states they had, in one batch, however many they are.

    Each step is worked out on the tree as the steps before it leave it: `parents` says where nodes hang by then, so
    that sums come out right when collections and what they hold are moved at once.  Only ids and numbers are kept
    in memory; names and manifests are copied from row to row inside the database.
    """

    def __init__(self, read: Callable[..., Iterator[tuple[Any, ...]]], root: int) -> None:
        self.read, self.root = read, root
        self.destroyed: list[tuple[Node, Node | None]] = []      # (what is overwritten or removed, what takes its place)
        self.parents: dict[int, int | None] = {}         # None: not live
        self.sums: dict[int, list[int]] = {}
        self.ends: list[tuple[str, int, int, int]] = []          # (fate, home, since, node)
        self.begins: list[tuple[int, str | None, str | None, int, int, int, int]] = []
        #                                                  (parent, name, key, fresh, home, since, node); name None: as it was
        self.loose = False

    def restore(self, then: Node, now: Node | None, parent: int, name: str | None = None) -> None:
        """Bring a node back to `then`, below a live `parent`, under its name or another."""
        if now:
            self._end(now, "moved" if then.manifest == now.manifest else "replaced")
            self.destroyed.append((now, then))
        fresh = int(now is None or then.manifest != now.manifest or then.mtime != now.mtime)
        self.begins.append((parent, name, name and key_of(name), fresh, then.home, then.since, then.node))
        self.parents[then.node] = parent
        self._count(then, +1)

    def remove(self, now: Node) -> None:
        """Put a live node into the trash."""
        self.destroyed.append((now._replace(files=now.files + self.sums.get(now.node, (0, 0))[1]) if now.kind else now, None))
        self._end(now, "deleted")
        self.parents[now.node] = None

    def _end(self, now: Node, fate: str) -> None:
        self._count(now, -1)
        self.ends.append((fate, now.home, now.since, now.node))
        self.loose |= bool(now.kind)

    def _count(self, node: Node, sign: int) -> None:
        size, files = self.sums.get(node.node, (0, 0)) if node.kind else (0, 0)
        size, files = node.size + size, (node.files if node.kind else 1) + files
        for above in self.chain(node.node):
            sum = self.sums.setdefault(above, [0, 0])
            sum[0] += sign * size
            sum[1] += sign * files

    def chain(self, node: int) -> list[int]:
        """What holds a node by now, upwards: to the root, or to what is deleted itself."""
        found: list[int] = []
        while node != self.root:
            if node not in self.parents:
                rows = list(self.read("SELECT parent FROM entry WHERE node = ? AND until IS NULL", (node,)))
                self.parents[node] = rows[0][0] if rows else None
            if self.parents[node] is None:
                break
            node = self.parents[node]
            found.append(node)
        return found

    def lives(self, node: int) -> bool:
        return node == self.root or self.root in self.chain(node)[-1:]

    def statements(self) -> list[Statement]:
        return [
            Statement("UPDATE entry SET until = (SELECT max(seq) FROM journal), fate = ? "
                      "WHERE home = ? AND since = ? AND node = ?", self.ends, many=True),
            Statement("INSERT INTO entry (home, since, node, parent, name, key, kind, manifest, size, mtime, media, rev) "
                      "SELECT home, s, node, ?1, coalesce(?2, name), coalesce(?3, key), kind, manifest, size, mtime, media, "
                      "CASE WHEN ?4 THEN s ELSE rev END FROM entry, (SELECT max(seq) AS s FROM journal) "
                      "WHERE home = ?5 AND since = ?6 AND node = ?7", self.begins, many=True),
            Statement("UPDATE collection SET seq = (SELECT max(seq) FROM journal), size = size + ?, files = files + ? "
                      "WHERE node = ?", [(*sum, node) for node, sum in self.sums.items()], many=True)]


WENT_BACK = "this server does not know what it said then: an older state of its data was put back"


class History(Tree):
    """What was: versions, trash, any moment of any collection, undo, and the feed of changes.  The first floor of Cloud."""

    def changes(self, who: Principal, path: tuple[str, ...], since: int, limit: int = 10_000,
                alive: Callable[[], None] = unwatched) -> tuple[int, list[Changed]]:
        """What batches after `since` touched below a path; returns the seq reached and each node once.

        A batch is never split, so there may be more than `limit`.  What came and went meanwhile has neither path.
        raises  CloudError gone if history does not reach back to `since`, other-history if it does not reach so far
        """
        top = self.stat(who, path)
        with self.db.snapshot() as read:
            (head,), = read("SELECT max(seq) FROM journal")
            if since > head:
                raise CloudError("other-history", WENT_BACK)
            (fed,), = read("SELECT fed FROM account WHERE id = ?", (top.home,))
            if since < max(fed, self.oldest_seq()):
                raise CloudError("gone", "what happened since then is not known any more; read everything anew")
            reached = min([head, *(seq for column in ("since", "until") for (seq,) in read(
                "SELECT %s FROM entry WHERE home = ? AND %s > ? ORDER BY %s LIMIT 1 OFFSET ?" % ((column,) * 3),
                (top.home, since, limit)))])
            then, now = _Past(read, top.node, since, purged=True), _Past(read, top.node, head)
            ids = [id for (id,) in read(
                "SELECT node FROM entry WHERE home = ? AND since > ? AND since <= ? "
                "UNION SELECT node FROM entry WHERE home = ? AND until > ? AND until <= ?",
                (top.home, since, reached) * 2)]
            ids = self._with_what_came_along(ids, then, now, alive)
            found = [Changed(id, getattr(now.node(id) or then.node(id), "kind", FILE), now.node(id), now.path(id), then.path(id))
                     for id in watched(ids, alive) if id != top.node]
            found = [c for c in found if c.path is not None or c.was is not None or self._was_in_sight(read, top.node, c.id, since)]
        return reached, sorted(found, key=lambda c: c.path or c.was or ())

    def _was_in_sight(self, read: Callable[..., Iterator[tuple[Any, ...]]], top: int, node: int, since: int) -> bool:
        """Did a node come and go after `since`?  Who made it knows of it, and has to be told."""
        ends = list(read("SELECT until FROM entry WHERE node = ? AND until > ?", (node, since)))
        return any(_Past(read, top, until - 1, purged=True).path(node) is not None for until, in ends)

    def _with_what_came_along(self, ids: list[int], then: _Past, now: _Past, alive: Callable[[], None]) -> list[int]:
        """Touched nodes, and what lies in collections that came into sight whole: from the trash, or from elsewhere."""
        found = dict.fromkeys(ids)
        pending = [id for id in watched(ids, alive) if now.here(id) and now.node(id).kind and not then.here(id)]
        while pending:
            alive()
            for child in now.children(pending.pop()):
                if child.node not in found:
                    found[child.node] = None
                    if child.kind:
                        pending.append(child.node)
        return list(found)

    def head(self) -> int:
        """The newest seq."""
        return self.db.read("SELECT max(seq) FROM journal")[0][0]

    def tag_at(self, seq: int) -> str | None:
        """What tells the history up to a seq from others; None if there is no such seq."""
        rows = self.db.read("SELECT tag FROM journal WHERE seq = ?", (seq,))
        return rows[0][0] if rows else None

    def check_history(self, epoch: str | None, since: int | None, tag: str | None) -> None:
        """Is a client's cursor a point of our own past?  What it does not say is not asked.

        raises  CloudError gone for another server, other-history when this one was put back to an older state
        """
        if epoch not in (None, self.epoch):
            raise CloudError("gone", "this is not the server it was, or it was restored from a backup; read everything anew")
        if since is not None and tag is not None and self.tag_at(since) != tag:
            log.warning("a client knows another history: if an older state of the data was put back, run the command `restored`")
            raise CloudError("other-history", WENT_BACK)

    def oldest_seq(self) -> int:
        """History before this seq may have been thinned out."""
        return int(self.db.setting("oldest") or 1)

    def walk_contents(self, who: Principal, path: tuple[str, ...], names: Sequence[tuple[str, ...]] = (),
                      seq: int | None = None, missed: Callable[[tuple[str, ...], CloudError], None] | None = None) -> Iterator[tuple[tuple[str, ...], Node, Content | None]]:
        """(path from there, node, bytes or None for a collection) of all below a path, as of now or of a seq.

        names    only these members; a single file as `path` gives itself, with the path ()
        missed   told of each path that cannot be read, and of why; without it that ends the walk
        """
        seq = self.head() if seq is None else seq
        first = [(name, self.past(who, path + name, seq)[0]) for name in names] or [((), self.past(who, path, seq)[0])]
        return self._walk_past(first, seq, missed)

    def _walk_past(self, pending: list[tuple[tuple[str, ...], Node]], seq: int,
                   missed: Callable[[tuple[str, ...], CloudError], None] | None = None) -> Iterator[tuple[tuple[str, ...], Node, Content | None]]:
        pending.reverse()
        while pending:
            path, node = pending.pop()
            try:
                found = self._content(node) if node.kind == FILE else None
                children = self._children_at(node, seq) if node.kind else []
            except CloudError as error:
                if missed is None:
                    raise
                missed(path, error)
                continue
            if path or node.kind == FILE:
                yield path, node, found
            pending += [(path + (child.name,), child) for child in reversed(children)]

    def _children_at(self, node: Node, seq: int) -> list[Node]:
        with self.db.snapshot() as read:
            return _Past(read, node.node, seq).children(node.node)

    def archive(self, who: Principal, path: tuple[str, ...], names: Sequence[tuple[str, ...]] = (),
                seq: int | None = None) -> Iterator[tuple[tuple[str, ...], Node, Content | None]]:
        """As walk_contents, in the lane for long work (Q3)."""
        return self._in_lane(who, self.walk_contents(who, path, names, seq))

    def _in_lane(self, who: Principal, items: Iterator[Any]) -> Iterator[Any]:
        with self._heavy(who):
            yield from items

    def seq_at(self, at: int) -> int:
        """The seq that was the newest at a time, ms since 1970."""
        low, high = 1, self.head()
        while low < high:                                # the journal's times rise, but for steps of the clock
            middle = (low + high + 1) // 2
            (seq, then), = self.db.read("SELECT seq, at FROM journal WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (middle,))
            low, high = (middle, high) if then <= at else (low, max(low, seq - 1))
        return low

    def journal_at(self, seq: int) -> int:
        """When a batch was written, ms since 1970."""
        rows = self.db.read("SELECT at FROM journal WHERE seq = ?", (seq,))
        return rows[0][0] if rows else 0

    # ---- a collection as it was

    def past(self, who: Principal, path: tuple[str, ...], seq: int) -> tuple[Node, list[Node]]:
        """The node that was at a path as of a seq and what it held.  raises CloudError not-found, gone"""
        self._root_spot(who)
        with self.db.snapshot() as read:
            past = _Past(read, who.root, seq)
            node = self._past_node(past, path)
            return node, past.children(node.node) if node.kind else []

    def _past_node(self, past: _Past, path: tuple[str, ...]) -> Node:
        self._check_reach(past.seq)
        node = past.node(past.top)
        for name in path:
            node = past.child(node.node, key_of(name)) if node and node.kind else None
        if node is None:
            raise CloudError("not-found", "there was nothing at this path")
        return node

    def past_content(self, who: Principal, path: tuple[str, ...], seq: int) -> tuple[Node, Content]:
        """A file as it was at a path as of a seq."""
        node, _ = self.past(who, path, seq)
        if node.kind:
            raise CloudError("conflict", "this was a collection")
        return node, self._content(node)

    def _check_reach(self, seq: int) -> None:
        if seq < self.oldest_seq():
            raise CloudError("gone", "history does not reach back that far")

    # ---- versions

    def versions(self, who: Principal, path: tuple[str, ...]) -> list[Version]:
        """Every content a file had, the newest first."""
        node = self.stat(who, path)
        if node.kind:
            raise CloudError("conflict", "a collection has no versions; ask for it as of a time")
        rows = self.db.read(
            "SELECT v.rev, j.at, v.size, v.mtime, v.manifest, a.name, coalesce(d.name, ''), p.name "
            "FROM (SELECT rev, size, mtime, manifest FROM entry WHERE node = :node AND until IS NULL "
            "UNION SELECT rev, size, mtime, manifest FROM entry WHERE node = :node AND until IS NOT NULL) v "
            "LEFT JOIN journal j ON j.seq = v.rev LEFT JOIN account a ON a.id = j.account LEFT JOIN device d ON d.id = j.device "
            "LEFT JOIN pin p ON p.node = :node AND p.rev = v.rev ORDER BY v.rev DESC", {"node": node.node})
        found = [version for version in map(Version._make, rows) if self._was_within(who, node.node, version.rev)]
        return [version for version, older in itertools.zip_longest(found, found[1:])
                if older is None or older.manifest != version.manifest or version.name]

    def version(self, who: Principal, path: tuple[str, ...], rev: int) -> tuple[Node, Content]:
        """A file as it was in one of its versions.  raises CloudError not-found"""
        live = self.stat(who, path)
        rows = self.db.read("SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node WHERE e.rev = :rev "
                            "AND e.kind = 0 AND (e.node = :node AND e.until IS NULL OR e.node = :node AND e.until IS NOT NULL) "
                            "ORDER BY e.since LIMIT 1", {"rev": rev, "node": live.node})
        if not rows or not self._was_within(who, live.node, rev):
            raise CloudError("not-found", "there is no such version")
        node = Node._make(rows[0])._replace(name=live.name)
        return node, self._content(node)

    def _was_within(self, who: Principal, node: int, rev: int) -> bool:
        """Did a file lie below the root of `who` at any moment while it had the content of `rev`?"""
        if not who.scoped:
            return True
        pending = [(parent, since, until) for since, until, parent, content in self._stays(node) if content == rev]
        seen = set(pending)
        while pending:                                   # upwards, each time for as long as what is below was there
            above, start, stop = pending.pop()
            if above == who.root:
                return True
            for since, until, parent, _ in self._stays(above):
                stay = parent, max(start, since), min(stop, until)
                if parent is not None and stay[1] < stay[2] and stay not in seen:
                    seen.add(stay)
                    pending.append(stay)
        return False

    def _stays(self, node: int) -> list[tuple[int, int, int | None, int]]:
        """(since, until, parent, rev) of all that a node ever was."""
        return self.db.read("SELECT since, :ever, parent, rev FROM entry WHERE node = :node AND until IS NULL UNION ALL "
                            "SELECT since, until, parent, rev FROM entry WHERE node = :node AND until IS NOT NULL",
                            {"node": node, "ever": 1 << 62})

    def restore_version(self, who: Principal, path: tuple[str, ...], rev: int, given: Preconditions = ANY) -> Node:
        """Make an old content the present one; the present one becomes a version."""
        self._require(who)

        def attempt() -> Batch:
            spot = self._spot(who, path)
            node = self._found(spot)
            spot = self._admit(who, spot, path, given)
            old, _ = self.version(who, path, rev)
            self._check_space(spot, old.size - node.size, 1)
            after = node._replace(manifest=old.manifest, size=old.size, mtime=old.mtime, media=old.media, rev=0)
            return self._batch(who, spot, "restore-version", {"path": "/".join(path), "rev": rev},
                               [Change(node, after, spot.chain, spot.chain)])

        batch = self.db.write(attempt)
        return batch.changes[0].after._replace(since=batch.seq, rev=batch.seq)

    def pin(self, who: Principal, path: tuple[str, ...], rev: int, name: str | None) -> None:
        """Keep a version for good under a name; None lets go of it."""
        self._require(who)
        node, _ = self.version(who, path, rev)
        if name is not None and not 0 < len(name) <= 200:
            raise CloudError("bad-request", "the name of a version has 1 to 200 characters")
        if name is None:
            self.db.run(Statement("DELETE FROM pin WHERE node = ? AND rev = ?", (node.node, rev)))
        elif len(self.db.read("SELECT 1 FROM pin WHERE node = ?", (node.node,))) >= 1000:
            raise CloudError("conflict", "1000 versions of this file are pinned already")
        else:
            self.db.run(Statement("INSERT OR REPLACE INTO pin VALUES (?, ?, ?)", (node.node, rev, name)))

    # ---- thumbnails: small pictures that browsers make, kept under what they show

    def thumbnail(self, who: Principal, path: tuple[str, ...], rev: int | None = None) -> bytes | None:
        """The thumbnail of a file, or of one of its versions; None if nobody made one yet."""
        rows = self.db.read("SELECT data FROM thumbnail WHERE home = ? AND manifest = ?",
                            (who.account, self._pictured(who, path, rev).manifest))
        return rows[0][0] if rows else None

    def put_thumbnail(self, who: Principal, path: tuple[str, ...], data: bytes, rev: int | None = None) -> None:
        """Keep a thumbnail.  Whoever has the same content in another account does not get it: it could be a lie (D1).

        raises  CloudError unsupported-media if it is no picture, bad-request if it is larger than what it stands for
        """
        self._require(who)
        node = self._pictured(who, path, rev)
        if media_of_picture(data) is None:
            raise CloudError("unsupported-media", "a thumbnail is WebP, JPEG or PNG")
        if len(data) >= node.size:
            raise CloudError("bad-request", "a thumbnail is smaller than its file")
        self._check_space(self._spot(who, ()), 0, len(data))
        self.db.run(Statement("INSERT OR REPLACE INTO thumbnail (home, manifest, data) VALUES (?, ?, ?)",
                              (who.account, node.manifest, data)))

    def pictured(self, who: Principal) -> set[str]:
        """What has a thumbnail in the account: {manifest}."""
        return {manifest for (manifest,) in self.db.read("SELECT manifest FROM thumbnail WHERE home = ?", (who.account,))}

    def _pictured(self, who: Principal, path: tuple[str, ...], rev: int | None) -> Node:
        node = self.stat(who, path)
        if node.kind:
            raise CloudError("conflict", "a collection has no thumbnail")
        return node if rev in (None, node.rev) else self.version(who, path, rev)[0]

    # ---- trash

    def trash(self, who: Principal, before: int = 1 << 62, limit: int = 1000) -> list[Trashed]:
        """What was deleted and can be restored, the latest first; `before` is a seq to go on from."""
        self._require_whole(who)
        return self._trashed(who, "e.until < ? ", before, limit)

    def _trashed(self, who: Principal, where: str, value: int, limit: int) -> list[Trashed]:
        rows = self.db.read(
            "SELECT j.at, coalesce(a.name, ''), " + NODE + " FROM entry e JOIN journal j ON j.seq = e.until "
            "LEFT JOIN account a ON a.id = j.account LEFT JOIN collection c ON c.node = e.node "
            "WHERE e.home = ? AND e.fate = 'deleted' AND " + where + self._LAST + "ORDER BY e.until DESC, e.node LIMIT ?",
            (who.account, value, limit))
        with self.db.snapshot() as read:
            return [Trashed(node, at, account, (_Past(read, who.root, node.until - 1).path(node.parent) or ()) + (node.name,))
                    for at, account, node in ((at, account, Node._make(columns)) for at, account, *columns in rows)]

    _LAST = ("AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = e.node AND l.until IS NULL) "       # it did not come back
             "AND NOT EXISTS (SELECT 1 FROM entry p WHERE p.node = e.node AND p.since >= e.until AND p.until IS NOT NULL) ")

    def restore(self, who: Principal, *nodes: int) -> tuple[int, list[tuple[str, ...]]]:
        """Bring nodes back from the trash to where they were; returns the seq and where each is now.

        Collections that are gone too are made anew; a name that is taken is changed.
        raises  CloudError not-found if one is not in the trash
        """
        self._require(who)
        self._require_whole(who)
        for item in self._find_trashed(who, nodes):
            if len(item.path) > 1 and item.node.parent not in nodes and self._path_or_none(who, item.node.parent) is None:
                self._make_or_find(who, item.path[:-1])

        def attempt() -> Batch:
            with self.db.snapshot() as read:
                (head,), = read("SELECT max(seq) FROM journal")
                spot, taken = self._spot(who, ()), set()
                plan = Reversal(read, who.root)
                items = sorted(self._find_trashed(who, nodes), key=lambda item: len(item.path))
                for item in items:
                    if self._is_live(item.node.node):
                        raise CloudError("conflict", "it is back already")
                    parent = item.node.parent
                    if not plan.lives(parent):
                        there = self._spot(who, item.path)
                        parent = there.parent if there.open and len(there.rest) < 2 else who.root
                    plan.restore(item.node, None, parent, self._name_for(parent, item.node.name, taken, ()))
                self._check_space(spot, plan.sums[who.root][0], 0)
                return self._reversal_batch(who, spot, head, plan, "restore", name_paths([item.path for item in items]))

        seq = self.db.write(attempt).seq
        return seq, [self.path_of(who, node) for node in dict.fromkeys(nodes)]

    def trashed(self, who: Principal, node: int) -> Trashed:
        """One of them.  raises CloudError not-found"""
        self._require_whole(who)
        return self._find_trashed(who, [node])[0]

    def _find_trashed(self, who: Principal, nodes: Sequence[int]) -> list[Trashed]:
        found = [item for node in dict.fromkeys(nodes) for item in self._trashed(who, "e.node = ? ", node, 1)]
        if not nodes or len(found) < len(set(nodes)):
            raise CloudError("not-found", "it is not in the trash")
        return found

    def _name_for(self, parent: int, name: str, taken: set[tuple[int, str]], freed: Container[tuple[int, str]]) -> str:
        """The name, or one like it if something else has it; `taken` and `freed` are places (parent, key) of this batch."""
        place = parent, key_of(name)
        if place in taken or place not in freed and self.db.read(
                "SELECT 1 FROM entry WHERE parent = ? AND key = ? AND until IS NULL", place):
            name = self._free_name(parent, name, taken)
        taken.add((parent, key_of(name)))
        return name

    def _make_or_find(self, who: Principal, path: tuple[str, ...]) -> None:
        try:
            self.make_collection(who, path, parents=True)
        except CloudError as error:
            if error.kind not in ("exists", "conflict"):
                raise

    def _is_live(self, node: int) -> bool:
        return bool(self.db.read("SELECT 1 FROM entry WHERE node = ? AND until IS NULL", (node,)))

    def empty_trash(self, who: Principal, *nodes: int) -> int:
        """Give up deleted nodes for good, all of them if none is named; returns how many.

        They vanish at once; their bytes follow when the sweep has been.  A token cannot do this: whatever it deletes, the
        owner can bring back for as long as history is kept (R13).
        """
        self._require(who)
        self._require_whole(who)
        if who.means == "token":
            raise CloudError("forbidden", "an app password cannot empty the trash; do so on the page")
        chosen = [item.node for item in (self._find_trashed(who, nodes) if nodes else self.trash(who, limit=1 << 40))]
        rows = [(node.home, node.since, node.node) for node in chosen]
        self.db.write(lambda: Batch([*give_up(rows), raise_shape(who.account)], frees=True,
                                    line=Line(who.account, who, "empty-trash", {"count": len(rows)})))
        self.give_up_below((node.node, node.until) for node in chosen if node.kind)
        return len(rows)

    def give_up_below(self, tops: Iterable[tuple[int, int]]) -> None:
        """Mark all that hangs below collections (node, until) that were given up: nothing of it can be had at an earlier place."""
        pending = list(tops)
        while pending:
            top, until = pending.pop()
            rows = self.db.read("SELECT home, since, node, kind FROM entry WHERE parent = ? AND until IS NULL AND " + IS_GIVEN_UP
                                + " LIMIT ?", (top, PIECE))
            if rows:
                marked = [(until, *row[:3]) for row in rows]
                self.db.write(lambda: Batch([Statement(
                    "UPDATE entry SET until = ?, fate = 'purged' WHERE home = ? AND since = ? AND node = ? AND until IS NULL AND "
                    + IS_GIVEN_UP, marked, many=True), *map(raise_shape, {row[0] for row in rows})], frees=True))
                pending += [(top, until), *((node, until) for _, _, node, kind in rows if kind)]

    # ---- undo and restore to a moment

    def undo(self, who: Principal, seq: int) -> tuple[int, int]:
        """Take back what one batch did; returns (seq of doing so, nodes left as they are because they changed since).

        raises  CloudError not-found if there is nothing to take back, gone if that is too long ago, or given up for good
        """
        self._require_whole(who)

        def choose(then: _Past, now: _Past) -> tuple[list[int], int]:
            touched = [id for (id,) in now.read("SELECT node FROM entry WHERE home = :home AND since = :seq "
                                                "UNION SELECT node FROM entry WHERE home = :home AND until = :seq",
                                                {"home": who.account, "seq": seq}) if id != now.top]
            if not touched:
                raise CloudError("not-found", "there is nothing of that number to take back")
            later = {id for id in touched if list(now.read(
                "SELECT 1 FROM entry WHERE node = :id AND until IS NULL AND since > :seq UNION ALL "
                "SELECT 1 FROM entry WHERE node = :id AND until > :seq UNION ALL "
                "SELECT 1 FROM entry WHERE parent = :id AND until IS NULL AND since > :seq", {"id": id, "seq": seq}))}
            for id in [id for id in later if now.here(id)]:              # what holds them stays, too
                while id is not None and id != now.top:
                    later.add(id)
                    id = now.node(id).parent
            mine = [id for id in touched if id not in later and differs(then.here(id), now.here(id))]
            if not mine and any(then.is_lost(id) for id in touched):
                raise CloudError("gone", "what this step removed was given up for good")
            return mine, len(touched) - len(mine)

        return self._revert(who, (), seq - 1, choose, "undo", {"seq": seq})

    def rewind(self, who: Principal, path: tuple[str, ...], seq: int, *, dry: bool = False) -> tuple[int, int]:
        """Make a collection what it was as of a seq; returns (seq of doing so, nodes changed).  It can be undone.

        dry     only count
        """
        def choose(then: _Past, now: _Past) -> tuple[list[int], int]:
            mine = [id for id in now.touched_since(who.account, seq) if id != now.top and differs(then.here(id), now.here(id))
                    or not then.here(id) and now.would_come_along(then, id)]
            mine = [id for id in mine if not then.is_lost(id) and self._may_bring_back(who, then, now, id)]
            return mine, sum(differs(then.here(id), now.here(id)) for id in mine)

        if dry:
            return 0, len(self.differences(who, path, seq))
        return self._revert(who, path, seq, choose, "rewind", {"path": "/".join(path), "to": seq})

    def bring_back(self, who: Principal, seq: int, *paths: tuple[str, ...]) -> tuple[int, int]:
        """Make what was at paths as of a seq what it was, and all that it held, in one step; the rest stays as it is.

        What came into it since goes back to where it was, or to the trash.  Returns (seq of doing so, nodes changed), or (0, 0) if nothing has changed.  What held it and is gone by now is
        made anew.  raises CloudError not-found, gone
        """
        self._require(who)
        paths = tuple(outermost(paths))
        with self.db.snapshot() as read:
            then, now = _Past(read, who.root, seq), _Past(read, who.root, self.head())
            nodes = [self._past_node(then, path) for path in paths]
            chosen = {node.node for node in nodes}

            def choose(then: _Past, now: _Past) -> tuple[list[int], int]:
                inside = lambda id: any(above in chosen for above in then.line(id))
                touched = [id for id in {*chosen, *now.touched_since(who.account, seq)}
                           if id != now.top and any(map(inside, now.line(id)))]
                mine = [id for id in touched if differs(then.here(id), now.here(id)) or not then.here(id) and now.node(id)]
                mine = [id for id in mine if not then.is_lost(id) and self._may_bring_back(who, then, now, id)
                        and not (id in chosen and then.is_as(now, id))]
                return mine, len(mine)

            if not choose(then, now)[0]:
                return 0, 0
        for path, node in zip(paths, nodes):
            if len(path) > 1 and self._path_or_none(who, node.parent) is None:
                self._make_or_find(who, path[:-1])
        return self._revert(who, (), seq, choose, "rewind", {"path": "/".join(paths[0]), "to": seq})

    def _may_bring_back(self, who: Principal, then: _Past, now: _Past, id: int) -> bool:
        """May a device change this node by going back to `then`?  Only if it lies, or died, in what the device is limited to,
        and lay nowhere else then."""
        if not who.scoped:
            return True
        ended = list(now.read("SELECT max(until) FROM entry WHERE node = ? AND until IS NOT NULL", (id,)))[0][0]
        last = _Past(now.read, who.root, now.seq if now.node(id) else (ended or 1) - 1)
        return last.here(id) is not None and (then.node(id) is None or _Past(then.read, who.root, then.seq).here(id) is not None)

    def differences(self, who: Principal, path: tuple[str, ...], seq: int,
                    alive: Callable[[], None] = unwatched) -> list[Difference]:
        """What became of the things below a collection since a seq, in the order of paths."""
        top = self.stat(who, path).node
        self._check_reach(seq)
        with self.db.snapshot() as read:
            then, now = _Past(read, top, seq), _Past(read, top, self.head())
            found = [Difference(then.here(id), now.here(id), then.path(id), now.path(id))
                     for id in watched(now.touched_since(who.account, seq), alive)
                     if id != top and differs(then.here(id), now.here(id))]
        return sorted(found, key=lambda one: one.path or one.was)

    def held(self, who: Principal) -> list[tuple[Brake, str]]:
        """Devices of the account that the brake holds, and their names."""
        rows = self.db.read("SELECT b.*, d.name FROM brake b JOIN device d ON d.id = b.device "
                            "WHERE d.account = ? AND b.held IS NOT NULL ORDER BY b.held", (who.account,))
        return [(Brake._make(columns), name) for *columns, name in rows]

    def _held(self, who: Principal, device: str) -> Brake:
        found = next((brake for brake, _ in self.held(who) if brake.device == device), None)
        if found is None:
            raise CloudError("not-found", "this device is not held")
        return found

    def allow(self, who: Principal, device: str) -> None:
        """Let a held device go on; for a while everything is allowed to it.  raises CloudError not-found"""
        self._held(who, device)
        free = self.clock.due() + BRAKE_FREE
        self.db.write(lambda: Batch([Statement("UPDATE brake SET held = NULL, deletes = 0, overwrites = 0, free = ? "
                                               "WHERE device = ?", (free, device))],
                                    line=Line(who.account, who, "allow", {"device": device})))

    def undo_device(self, who: Principal, device: str) -> tuple[int, int]:
        """Take back what a held device did since its window began, in one step; returns (seq, nodes changed).

        It is not held any more, but counted anew.  raises CloudError not-found
        """
        brake = self._held(who, device)

        def choose(then: _Past, now: _Past) -> tuple[list[int], int]:
            touched = [id for (id,) in now.read(
                "SELECT e.node FROM journal j JOIN entry e ON e.home = j.home AND e.since = j.seq "
                "WHERE j.home = :home AND j.seq > :seq AND j.device = :device UNION "
                "SELECT e.node FROM journal j JOIN entry e ON e.home = j.home AND e.until = j.seq "
                "WHERE j.home = :home AND j.seq > :seq AND j.device = :device",
                {"home": who.account, "seq": brake.seq, "device": device})]
            mine = [id for id in touched if differs(then.here(id), now.here(id))]
            return mine, len(mine)

        done = self._revert(who, (), brake.seq, choose, "undo", {"device": device, "seq": brake.seq})
        self.db.run(Statement("DELETE FROM brake WHERE device = ?", (device,)))
        return done

    def _revert(self, who: Principal, path: tuple[str, ...], seq: int, choose: Callable[[_Past, _Past], tuple[list[int], int]],
                action: str, detail: dict[str, Any]) -> tuple[int, int]:
        """Bring the chosen nodes below a path back to what they were as of a seq."""
        self._require(who)
        self._check_reach(seq)
        told = [0]

        def attempt() -> Batch:
            with self.db.snapshot() as read:
                (head,), = read("SELECT max(seq) FROM journal")
                spot = self._spot(who, path)
                top = self._found(spot).node
                if spot.locked:
                    self._check_locks(who, spot, ANY, below=True)
                then, now = _Past(read, top, seq), _Past(read, top, head)
                chosen, told[0] = choose(then, now)
                root = (*spot.chain, top)[0]
                plan = self._plan_reversal(read, root, then, now, chosen)
                self._check_space(spot, plan.sums.get(root, [0])[0], 0)
                return self._reversal_batch(who, spot, head, plan, action, {**detail, "count": len(chosen)})

        with self._heavy(who):
            return self.db.write(attempt).seq, told[0]

    def _plan_reversal(self, read: Callable[..., Iterator[tuple[Any, ...]]], root: int, then: _Past, now: _Past,
                       chosen: list[int]) -> Reversal:
        """First what must go, then what comes back or moves, from the top down."""
        plan, freed, taken = Reversal(read, root), set(), set()
        wanted = sorted((id for id in chosen if then.here(id)), key=lambda id: len(then.path(id)))
        unwanted = set(chosen).difference(wanted)
        for id in chosen:
            node = now.node(id)
            if node:
                freed.add((node.parent, key_of(node.name)))
        for id in unwanted:
            node = now.here(id)
            if node and node.parent not in unwanted:     # else it goes with what holds it
                self._return_or_remove(plan, then, node)
        for id in wanted:
            old = then.node(id)
            parent = old.parent if plan.lives(old.parent) else self._stand_in(plan, then, now, old.parent, chosen)
            plan.restore(old, now.node(id), parent, self._name_for(parent, old.name, taken, freed))
        for id in unwanted:
            if not now.here(id) and then.top in plan.chain(id):          # it came along with what is back
                plan.remove(now.node(id))
        return plan

    def _stand_in(self, plan: Reversal, then: _Past, now: _Past, id: int, chosen: Container[int]) -> int:
        """The collection that is where one was that is gone, and stays there; the top if there is none."""
        found = then.top
        for name in then.path(id) or ():
            child = now.child(found, key_of(name))
            if child is None or not child.kind or child.node in chosen:
                return then.top
            found = child.node
        return found if plan.lives(found) else then.top

    def _return_or_remove(self, plan: Reversal, then: _Past, node: Node) -> None:
        """A node that was not below the collection: back to where it was, if that is still there, else to the trash."""
        old = then.node(node.node)
        if old and old.parent is not None and plan.lives(old.parent):
            plan.restore(old, node, old.parent, self._name_for(old.parent, old.name, set(), ()))
        else:
            plan.remove(node)

    def _reversal_batch(self, who: Principal, spot: Spot, head: int, plan: Reversal, action: str,
                        detail: dict[str, Any]) -> Batch:
        """The batch of a Reversal planned at `head`; nothing in the home may have changed since."""
        brake = self._brake(who, plan.destroyed) if who.means == "token" else []
        batch = self._batch(who, spot, action, detail, [], [*brake, *plan.statements()])
        batch.guards.append(Statement("SELECT 'changed' FROM account a JOIN collection c ON c.node = a.root "
                                      "WHERE a.id = ? AND c.seq > ?", (spot.home, head)))
        if plan.loose:
            batch.body.append(raise_shape(spot.home))
        return batch

    def _require_whole(self, who: Principal) -> None:
        if who.scoped:
            raise CloudError("forbidden", "this device is limited to one collection")

    # ---- activity and search

    def activity(self, who: Principal, before: int = 1 << 62, limit: int = 100, *, action: str | None = None,
                 device: str | None = None, after: int = 0, until: int = 1 << 62) -> list[Step]:
        """The journal of the account, the latest first.

        before         a seq to go on from;  action, device  only these
        after, until   ms since 1970
        """
        self._require_whole(who)
        rows = self.db.read(
            "SELECT " + STEP + " WHERE j.home = ? AND j.action <> 'copy-begin' AND j.seq < ? AND (? IS NULL OR j.action = ?) AND (? IS NULL OR d.name = ?) "
            "AND j.at >= ? AND j.at < ? ORDER BY j.seq DESC LIMIT ?",
            (who.account, before, action, action, device, device, after, until, limit))
        return self._steps(rows)

    def server_activity(self, before: int = 1 << 62, limit: int = 100) -> list[Step]:
        """What happened to accounts and settings of the whole server, the latest first: what the index journal_server holds."""
        return self._steps(self.db.read(
            "SELECT " + STEP + " WHERE j.action IN ('account-add', 'account-password', 'account-admin', 'account-quota', "
            "'account-remove', 'settings', 'hold') AND j.seq < ? ORDER BY j.seq DESC LIMIT ?", (before, limit)))

    def _steps(self, rows: list[tuple[Any, ...]]) -> list[Step]:
        return [Step(seq, at, action, json.loads(detail), account, device,
                     bool(undoable) and action[:8] != "account-" and seq > self.oldest_seq())
                for seq, at, action, detail, account, device, undoable in rows]

    def search(self, who: Principal, query: Query, path: tuple[str, ...] = (), limit: int = 200,
               alive: Callable[[], None] = unwatched) -> tuple[list[Found], bool]:
        """What fits a query below a path, the latest changed first, names before contents; and whether there is more.

        Words stand anywhere in a name, in any case; in contents at the beginning of a word.
        """
        self.stat(who, path)
        found, seen = [], set()
        with nullcontext() if query.words else self._heavy(who):         # without words everything is looked at
            for node, inside in self._hits(who, query, alive):
                if node.node in seen or not fits(query, node):
                    continue
                seen.add(node.node)
                where = self._path_or_none(who, node.node)
                if where is not None and where[:len(path)] == path and len(where) > len(path):
                    if len(found) == limit:
                        return found, True
                    found.append(Found(where, node, self._snippet(node, query.words) if inside else None))
        return found, False

    def _hits(self, who: Principal, query: Query, alive: Callable[[], None]) -> Iterator[tuple[Node, bool]]:
        """(node, do the words stand in its contents?) of nodes that may fit."""
        if query.within != "contents" or not query.words:
            for node in watched(self._candidates(who, query), alive):
                folded = node.name.casefold()
                if all(word in folded for word in query.words) and not any(word in folded for word in query.without):
                    yield node, False
        if query.within != "names" and query.words and self.db.has_index():
            wanted = " AND ".join(map(match_words, query.words)) + "".join(" NOT " + match_words(word) for word in query.without)
            for row in watched(self.db.each(
                    "SELECT " + NODE + " FROM text_index i JOIN text_row r ON r.id = i.rowid JOIN entry e ON e.manifest = r.manifest "
                    "AND e.home = r.home AND e.until IS NULL LEFT JOIN collection c ON c.node = e.node "
                    "WHERE text_index MATCH ? AND r.home = ? ORDER BY i.rowid DESC",
                    ('home : "%d" AND body : (%s)' % (who.account, wanted), who.account)), alive):
                yield Node._make(row), True

    def _snippet(self, node: Node, words: Sequence[str]) -> tuple[str, str, str] | None:
        text = decode_text(self._content(node).read(TEXT_LIMIT))
        return text and find_words(unicodedata.normalize("NFC", text), words)

    def find_all(self, who: Principal, path: tuple[str, ...], test: Callable[[Node], bool],
                 alive: Callable[[], None] = unwatched) -> list[tuple[tuple[str, ...], Node]]:
        """(path from there, node) of all below a path that pass a test."""
        with self._heavy(who):
            return [row for row in watched(self.walk(who, path), alive) if test(row[1])]

    def marked(self, who: Principal, name: str) -> list[tuple[tuple[str, ...], Node, str]]:
        """(path, node, value) of all nodes that bear a dead property."""
        found = [(self._path_or_none(who, id), id, value) for id, value in self.db.read(
            "SELECT p.node, p.value FROM property p JOIN entry e ON e.node = p.node AND e.until IS NULL "
            "WHERE p.name = ? AND e.home = ?", (name, who.account))]
        return sorted((path, self._node(id), value) for path, id, value in found if path is not None)

    def _candidates(self, who: Principal, query: Query) -> Iterator[Node]:
        """Live nodes of the account: those the index of names knows to fit, and all it has not seen yet."""
        usable = query.words and all(len(word) > 2 for word in query.words)
        indexed = int(self.db.setting("indexed") or 0) if usable else 0
        yield from map(Node._make, self.db.each(
            "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node WHERE e.home = ? AND e.since > ? "
            "AND e.until IS NULL AND (e.kind = 1 OR e.size >= ? AND e.size <= ?) AND e.mtime >= ? AND e.mtime < ? ORDER BY e.since DESC",
            (who.account, indexed, query.least or 0, sys.maxsize if query.most is None else query.most,
             MTIME_MIN if query.after is None else query.after, MTIME_MAX + 1 if query.before is None else query.before)))
        if indexed:
            wanted = " AND ".join('"%s"' % word.replace('"', '""') for word in query.words)
            yield from map(Node._make, self.db.each(
                "SELECT " + NODE + " FROM name_index i JOIN name_row r ON r.id = i.rowid JOIN entry e ON e.node = r.node "
                "AND e.until IS NULL LEFT JOIN collection c ON c.node = e.node WHERE name_index MATCH ? AND e.home = ? "
                "ORDER BY i.rowid DESC", (wanted, who.account)))

    def star(self, who: Principal, *paths: tuple[str, ...], on: bool) -> None:
        """Mark files and collections with a star, in one step, or take it away."""
        self._require(who)

        def attempt() -> Batch:
            nodes = [self._found(self._spot(who, path)) for path in paths]
            rows = [row for node in nodes for row in self._property_rows(node, {STAR: STARRED if on else None})]
            return self._batch(who, self._spot(who, ()), "star" if on else "unstar", name_paths(paths), [], rows)

        self.db.write(attempt)

    def starred(self, who: Principal) -> list[tuple[tuple[str, ...], Node]]:
        """(path, node) of all that bears a star, in the order of paths."""
        return [(path, node) for path, node, value in self.marked(who, STAR) if is_star(value)]

    def stars_among(self, nodes: Iterable[Node]) -> set[int]:
        """Which of some nodes bear a star."""
        if not self.db.read("SELECT 1 FROM property WHERE name = ? LIMIT 1", (STAR,)):
            return set()
        return {id for piece in pieces([node.node for node in nodes]) for id, value in self.db.read(
            "SELECT node, value FROM property WHERE name = ? AND node IN (" + marks(piece) + ")", (STAR, *piece)) if is_star(value)}

    def by_id(self, who: Principal, node: int) -> list[tuple[tuple[str, ...], Node]]:
        """(path, node) of a live node, if `who` can see it."""
        path = self._path_or_none(who, node)
        return [] if path is None else [(path, self._node(node))]

    def _node(self, id: int) -> Node:
        rows = self.db.read("SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node "
                            "WHERE e.node = ? AND e.until IS NULL", (id,))
        if not rows:
            raise CloudError("not-found", "it was just deleted")
        return Node._make(rows[0])


def differs(then: Node | None, now: Node | None) -> bool:
    """Would bringing a node back change anything?"""
    if then is None or now is None:
        return then is not now
    return (then.parent, then.name, then.manifest, then.mtime) != (now.parent, now.name, now.manifest, now.mtime)


def is_star(value: str) -> bool:
    """Does this value of STAR, an element, say yes?"""
    found = re.search(">([^<]*)<", value)
    return bool(found) and found[1].strip() in ("1", "yes", "true")


# ---- native sync

class Place(NamedTuple):
    """One line of a manifest."""
    path: tuple[str, ...]
    node: Node
    sha256: str | None
    chunks: list[tuple[str, int]] | None         # (hash, size) in order, if asked for


class Draft:
    """The tree as the steps of a commit leave it, one after the other; nothing is written before all are decided.

    A node that several steps touch leaves one state and takes one other.  Sums are kept step by step, each along
    the collections that hold the node by then.
    """

    def __init__(self, db: Database, root: Spot, received: "Received", *, held: bool) -> None:
        """
        root      where who asks begins
        held      nothing may be deleted or overwritten
        """
        self.db, self.root, self.received, self.held = db, root, received, held
        self.known: dict[str, int] = {}              # {hash: bytes} of chunks that steps may name
        self.used: set[str] = set()                  # those that they did name
        self.body: list[Statement] = []              # rows of manifests
        self.guards: list[Statement] = []            # what steps looked at, and must hold when they are done
        self.sums: dict[int, list[int]] = {}
        self.growth = 0
        self._states: dict[int, tuple[Node | None, Node | None]] = {}
        self._places: dict[tuple[int, str], Node | None] = {}
        self._chains: dict[tuple[str, ...], tuple[int, ...] | None] = {}
        self._made: set[int] = set()

    def spot(self, path: tuple[str, ...]) -> Spot:
        """Where a path leads by now."""
        if not path:
            return self.root
        there, chain, opened = len(path) - 1, None, True
        while chain is None:
            chain = self._chain(path[:there])
            if chain is None:
                there -= 1
                opened = self._child_at(path[:there], path[there]) is None
        node = self._child(chain[-1], path[-1]) if there == len(path) - 1 else None
        return self.root._replace(used=self.root.used + self.growth, chain=chain, open=opened,
                                  rest=() if node else path[there:], node=node)

    def _chain(self, path: tuple[str, ...]) -> tuple[int, ...] | None:
        """Ids of the collections down to the one at a path; None if there is none."""
        if not path:
            return self.root.chain + (self.root.node.node,)
        if path not in self._chains:
            above = self._chain(path[:-1])
            node = self._child(above[-1], path[-1]) if above else None
            self._chains[path] = above + (node.node,) if node and node.kind else None
        return self._chains[path]

    def _child_at(self, path: tuple[str, ...], name: str) -> Node | None:
        chain = self._chain(path)
        return self._child(chain[-1], name) if chain else None

    def _child(self, parent: int, name: str) -> Node | None:
        place = parent, key_of(name)
        if place not in self._places:
            rows = () if parent in self._made else self.db.read(
                "SELECT " + NODE + " FROM entry e LEFT JOIN collection c ON c.node = e.node "
                "WHERE e.parent = ? AND e.key = ? AND e.until IS NULL", place)
            self._places[place] = Node._make(rows[0]) if rows else None
        return self._places[place]

    def rely_on(self, spot: Spot) -> None:
        """What was checked at a spot must hold when the steps are done, unless a step before made it so."""
        if spot.node and spot.node.node not in self._states:
            self.guards += spot.guards

    def check_brake(self) -> None:
        """Before something is deleted or overwritten.  raises CloudError held"""
        if self.held:
            raise CloudError("held", "this device is held; allow or undo what it did on the page")

    def is_made_here(self, node: Node) -> bool:
        return node.node in self._made

    def apply(self, change: Change) -> None:
        """Take one step."""
        before, after = change.before, change.after
        id = (after or before).node
        first = self._states[id][0] if id in self._states else before
        self._states[id] = first, after
        if before:
            self._places[before.parent, key_of(before.name)] = None
            self._count(change.left, before, -1)
        if after:
            self._places[after.parent, key_of(after.name)] = after
            self._count(change.joined, after, +1)
        if (after or before).kind:
            self._chains.clear()
            if before is None:
                self._made.add(id)

    def _count(self, chain: tuple[int, ...], node: Node, sign: int) -> None:
        size, files = self.sums.get(node.node, (0, 0)) if node.kind else (0, 0)
        size, files = node.size + size, (node.files if node.kind else 1) + files
        self.growth += sign * size
        for above in chain:
            sum = self.sums.setdefault(above, [0, 0])
            sum[0] += sign * size
            sum[1] += sign * files

    def changes(self) -> list[Change]:
        """What became of each node that was touched."""
        return [Change(before, after, fate="deleted" if after is None else "replaced" if before and
                       before.manifest != after.manifest else "moved")
                for before, after in self._states.values() if before != after]

    def state(self, node: Node | None) -> Node | None:
        """What a node is in the end; its seq is 0 if that of the commit will be it."""
        if node is None:
            return None
        node = self._states.get(node.node, (None, node))[1]
        return node._replace(seq=0) if node and node.node in self.sums else node


class Received:
    """Chunks that came with a request: what is small waits to be written with the batch, the rest is durable."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.heads: dict[str, bytes] = {}
        self.relied: set[str] = set()                # hashes of those that were stored already
        self.rows: list[tuple[Any, ...]] = []        # for the table chunk
        self.waiting = 0                             # bytes in rows


class Outcome(NamedTuple):
    """What became of one step of a commit."""
    status: int
    node: Node | None = None
    problem: dict[str, Any] | None = None


class Sync(History):
    """Many small things in one request, and of a large one only what the other side lacks.  The second floor of Cloud."""

    # ---- what there is

    def manifest(self, who: Principal, path: tuple[str, ...], seq: int | None = None,
                 chunks: bool = False) -> tuple[int, Node, Iterator[Place]]:
        """(seq, the node at a path, all below it in the order of paths), as of now or of a seq.

        raises  CloudError not-found, gone
        """
        seq = self.head() if seq is None else seq
        self._root_spot(who)
        with self.db.snapshot() as read:
            top = self._past_node(_Past(read, who.root, seq), path)
        return seq, top, self._manifest(top, path, seq, chunks)

    def _manifest(self, top: Node, path: tuple[str, ...], seq: int, chunks: bool) -> Iterator[Place]:
        pending = [(path, self._rows_at(top.node, seq))]
        while pending:
            above, rows = pending[-1]
            row = next(rows, None)
            if row is None:
                pending.pop()
                continue
            place = self._place(above, Node._make(row[:15]), row[15], chunks)
            yield place
            if place.node.kind:
                pending.append((place.path, self._rows_at(place.node.node, seq)))

    def _rows_at(self, parent: int, seq: int) -> Iterator[tuple[Any, ...]]:
        """Rows of PLACES_AT, some at a time: nobody who reads slowly keeps a snapshot open."""
        after = ""
        while True:
            rows = self.db.read(PLACES_AT, {"parent": parent, "seq": seq, "after": after, "limit": PIECE})
            yield from rows
            if len(rows) < PIECE:
                return
            after = rows[-1][16]

    def _place(self, above: tuple[str, ...], node: Node, sha256: str | None, chunks: bool) -> Place:
        single = node.kind == FILE and node.manifest[0] != "m"
        return Place(above + (node.name,), node, node.manifest if single else sha256,
                     self.chunks_of(node) if chunks and not node.kind else None)

    def chunks_of(self, node: Node) -> list[tuple[str, int]]:
        """(hash, size) of the chunks of a file in order; an empty file has none."""
        if node.manifest[0] != "m":
            return [(node.manifest, node.size)] if node.size else []
        return self.db.read("SELECT m.chunk, h.size FROM manifest_chunk m JOIN chunk h ON h.hash = m.chunk "
                            "WHERE m.manifest = ? ORDER BY m.offset", (node.manifest,))

    def place_of(self, node: Node, path: tuple[str, ...], chunks: bool) -> Place:
        """A live node as a manifest tells it."""
        rows = [] if node.kind else self.db.read("SELECT sha256 FROM manifest WHERE id = ?", (node.manifest,))
        return self._place(path[:-1], node, rows[0][0] if rows else None, chunks)

    def await_change(self, who: Principal, since: int, seconds: float, alive: Callable[[], None] = unwatched) -> bool:
        """Wait until something in the account is newer than a seq; False if nothing was in time.

        Somebody who waits looks at one row every tenth of a second; so many may wait at a time and no more.
        raises  CloudError busy
        """
        until = time.monotonic() + seconds
        if self._waits.taken() >= WAITERS:
            raise CloudError("busy", "%d wait for changes already" % WAITERS, retry_after=5)
        with self._waits.of(who.account):
            while self.newest(who) <= since:
                alive()
                if time.monotonic() >= until or self.closing.wait(0.1):
                    return False
            return True

    def newest(self, who: Principal) -> int:
        """The seq of the last change of an account's tree."""
        rows = self.db.read("SELECT c.seq FROM account a JOIN collection c ON c.node = a.root WHERE a.id = ? "
                            "AND (? = '' OR EXISTS (SELECT 1 FROM device WHERE id = ?))", (who.account, who.device, who.device))
        if not rows:
            raise CloudError("unauthenticated", "this device was revoked")
        return rows[0][0]

    # ---- chunks

    def known(self, who: Principal, hashes: Iterable[str]) -> dict[str, int]:
        """{hash: size} of the chunks that `who` may read already or has sent: nobody else's count (D3)."""
        found, now = {}, self.clock.due()
        for some in pieces(list(dict.fromkeys(hashes))):
            found.update(self.db.read(
                "SELECT h.hash, h.size FROM chunk h WHERE h.hash IN (" + marks(some) + ") AND h.bad IS NULL AND h.condemned IS NULL "
                "AND (EXISTS (SELECT 1 FROM loose WHERE home = ? AND chunk = h.hash AND due > ?) OR " + OWNED + ")",
                (*some, who.account, now, who.account, who.account)))
        return {hash: size for hash, size in found.items() if self._is_within(who, hash, now)} if who.scoped else found

    def _is_within(self, who: Principal, hash: str, now: int) -> bool:
        """Is a chunk part of a live file below the root of a device that is limited to that, or did such a device send it?"""
        nodes = self.db.read("SELECT node FROM entry WHERE manifest = :hash AND home = :home AND until IS NULL UNION "
                             "SELECT e.node FROM manifest_chunk m JOIN entry e ON e.manifest = m.manifest "
                             "WHERE m.chunk = :hash AND e.home = :home AND e.until IS NULL", {"hash": hash, "home": who.account})
        return any(who.root in self._above_or_none(node) for (node,) in nodes) or bool(self.db.read(
            "SELECT 1 FROM loose WHERE home = ? AND chunk = ? AND root = ? AND due > ?", (who.account, hash, who.root, now)))

    def missing(self, who: Principal, hashes: Sequence[str]) -> list[str]:
        """Those that would have to be sent."""
        known = self.known(who, hashes)
        return [hash for hash in hashes if hash not in known]

    def read_chunks(self, who: Principal, hashes: Sequence[str]) -> tuple[int, Iterator[bytes | FileSlice]]:
        """(bytes of them all, their bytes in turn).  raises CloudError missing"""
        known = self.known(who, hashes)
        if len(known) < len(set(hashes)):
            raise CloudError("missing", "not all of these chunks can be read",
                             missing=[hash for hash in hashes if hash not in known])
        return sum(known[hash] for hash in hashes), self._read_chunks(hashes)

    def _read_chunks(self, hashes: Sequence[str]) -> Iterator[bytes]:
        for some in pieces(hashes, 64):
            rows = {row[0]: StoredChunk._make(row) for row in self.db.read(
                "SELECT " + CHUNK + " FROM chunk h WHERE h.hash IN (" + marks(some) + ")", some)}
            for hash in some:
                if hash not in rows:
                    raise CloudError("storage-failed", "a chunk is gone")
                yield rows[hash].size.to_bytes(4, "big")
                yield from self.blobs.slices(iter([(rows[hash], 0, rows[hash].size)]))

    def send(self, who: Principal, frames: Iterable[bytes]) -> list[str]:
        """Store chunks ahead of the commit that will name them; returns their hashes.  raises CloudError over-quota"""
        self._require(who)
        received = self._receive(who, frames)
        self._flush(who, received)
        return list(received.sizes)

    def _receive(self, who: Principal, frames: Iterable[bytes]) -> Received:
        """Take frames as they come, hashing and writing the large ones in the lane."""
        received, tag, flying = Received(), secrets.token_hex(8), deque()
        spot = self._spot(who, ())
        (ahead,), = self.db.read("SELECT coalesce(sum(size), 0) FROM loose WHERE home = ? AND due > ?",
                                 (who.account, self.clock.due()))
        for data in frames:
            hash = hashlib.sha256(data).hexdigest()
            if hash in received.sizes:
                continue
            ahead += len(data)
            self._check_space(spot, ahead, len(data))
            received.sizes[hash], received.heads[hash] = len(data), data[:32]
            if len(data) <= INLINE_LIMIT:
                received.rows.append((hash, len(data), None, self.clock.due(), data))
                received.waiting += len(data)
                if received.waiting > FLUSH:
                    self._flush(who, received)
            elif self._knows(who.account, hash):
                received.relied.add(hash)
            else:
                while flying and sum(size for _, size in flying) + len(data) > CHUNK_LIMIT:
                    flying.popleft()[0].result()
                flying.append((self.blobs.lane.submit(self.blobs.put_chunk, hash, data, tag), len(data)))
                received.rows.append((hash, len(data), "%s-%s" % (hash, tag), self.clock.due(), None))
        while flying:
            flying.popleft()[0].result()
        return received

    def _flush(self, who: Principal, received: Received) -> None:
        """Write the rows that wait, and note whose they are."""
        self.db.run(*self._loose_rows(who, received.rows))
        received.rows, received.waiting = [], 0

    # ---- the commit

    def commit(self, who: Principal, op: str, digest: str, steps: Sequence[dict[str, Any]], frames: Iterable[bytes], *,
               atomic: bool = False, since: int | None = None) -> tuple[int, list[dict[str, Any]], bool]:
        """Take many steps in one batch; returns (its seq or 0, an outcome for each, whether nothing else happened since).

        op       an id the client chose: the same again changes nothing and is answered the same
        digest   of all that was asked, to tell a repetition from a reuse
        frames   new chunks that the steps name
        atomic   take all steps or none
        since    a seq of the client's; the last result says whether all that is newer was done by this device
        raises   CloudError op-reused, bad-frame, over-quota, busy
        """
        self._require(who)
        id = "%d:%s" % (who.account, op)
        again = self._answer_again(id, digest)
        received = self._receive(who, frames)
        if again:
            return (*again, False)
        last: list[list[Outcome]] = []

        def attempt() -> Batch:
            try:
                batch, outcomes = self._plan_commit(who, (id, digest), steps, received, atomic, False)
            except CloudError as error:
                if error.kind != "held":
                    raise
                batch, outcomes = self._plan_commit(who, (id, digest), steps, received, atomic, True)
            last[:] = [outcomes]
            return batch

        try:
            batch = self.db.write(attempt)
        except Replayed:
            return (*(self._answer_again(id, digest) or (0, [])), False)
        alone = since is not None and not self.db.read(
            "SELECT 1 FROM journal WHERE home = ? AND seq > ? AND seq <> ? AND (device = '' OR device <> ?) LIMIT 1",
            (who.account, since, batch.seq, who.device))
        return batch.seq, describe_outcomes(last[0], batch.seq), alone

    def _answer_again(self, id: str, digest: str) -> tuple[int, list[dict[str, Any]]] | None:
        for seq, known, result in self.db.read("SELECT seq, digest, result FROM op WHERE id = ?", (id,)):
            if known != digest:
                raise CloudError("op-reused", "this operation id was used for something else")
            return seq, [{**item, "etag": item["etag"].replace("*", "%x" % seq)} for item in json.loads(result)]
        return None

    def _plan_commit(self, who: Principal, op: tuple[str, str], steps: Sequence[dict[str, Any]], received: Received,
                     atomic: bool, held: bool) -> tuple[Batch, list[Outcome]]:
        """Decide every step on the tree as the steps before it leave it."""
        root = self._spot(who, ())
        draft = Draft(self.db, root, received, held=held)
        draft.known = {**self.known(who, [hash for step in steps for hash, _ in step.get("chunks") or ()
                                          if hash not in received.sizes]), **received.sizes}
        outcomes = [self._take(who, draft, step) for step in steps]
        if atomic and any(outcome.problem for outcome in outcomes):
            failed = problem_of(CloudError("not-done", "another step failed, and all or none was asked for"))
            return Batch(self._loose_rows(who, received.rows)), [
                outcome if outcome.problem else Outcome(424, None, failed) for outcome in outcomes]
        changes = draft.changes()
        outcomes = [outcome._replace(node=draft.state(outcome.node)) for outcome in outcomes]
        body = [*self._loose_rows(who, received.rows, draft.used), *draft.body,
                *self._drop_locks(root, *(change.before for change in changes if change.before))]
        if not changes:
            return Batch(body), outcomes
        paths = [split_path(step.get("to") or next(step[verb] for verb in COMMIT_STEPS if verb in step))
                 for step, outcome in zip(steps, outcomes) if not outcome.problem]
        relied = still_stored([hash for hash in draft.used if hash not in received.sizes or hash in received.relied])
        batch = self._batch(who, root._replace(guards=(*draft.guards, *relied)), "sync", name_paths(paths), changes, body, sums=draft.sums)
        batch.op, batch.result = op, json.dumps(describe_outcomes(outcomes, None))
        return batch, outcomes

    def _loose_rows(self, who: Principal, rows: list[tuple[Any, ...]], used: Container[str] = ()) -> list[Statement]:
        """Make chunks known; those that nothing uses yet stay with the account for a while."""
        due = self.clock.due() + LOOSE_LIFE
        loose = [(who.account, row[0], row[1], due, who.root) for row in rows if row[0] not in used]
        return [*([Statement(CHUNK_ROWS, rows, many=True)] if rows else ()),
                *([Statement("INSERT OR REPLACE INTO loose (home, chunk, size, due, root) VALUES (?, ?, ?, ?, ?)", loose, many=True)]
                  if loose else ())]

    def _take(self, who: Principal, draft: Draft, step: dict[str, Any]) -> Outcome:
        """One step; a refusal becomes its outcome and leaves the draft as it was."""
        verb = next((name for name in COMMIT_STEPS if name in step), None)
        try:
            if verb is None:
                raise CloudError("bad-request", "a step is a put, mkdir, move or delete")
            path = split_path(step[verb])
            if not path:
                raise CloudError("forbidden", "the root stays as it is")
            return COMMIT_STEPS[verb](self, who, draft, path, step)
        except CloudError as error:
            return Outcome(error.status, None, problem_of(error))

    def _take_put(self, who: Principal, draft: Draft, path: tuple[str, ...], step: dict[str, Any]) -> Outcome:
        chunks = step["chunks"]
        lacking = [hash for hash, _ in chunks if hash not in draft.known]
        if lacking:
            raise CloudError("missing", "these chunks have to be sent first", missing=lacking)
        if any(draft.known[hash] != size for hash, size in chunks):
            raise CloudError("bad-request", "a chunk has another size")
        spot, size = draft.spot(path), sum(size for _, size in chunks)
        self._check_place(spot, path)
        if spot.node and spot.node.kind:
            raise CloudError("conflict", "a collection is at this path", now=spot.node)
        self._admit_step(who, draft, spot, path, step)
        self._check_space(spot, size - (spot.node.size if spot.node else 0), size)
        stored = Stored(manifest_of(chunks) if chunks else EMPTY, size, None, chunks, inline=None if chunks else b"",
                        head=self._head_of(draft, path[-1], chunks))
        if spot.node and spot.node.manifest != stored.manifest:
            draft.check_brake()
        change, _ = self._put_change(spot, path, stored, step["mtime"])
        draft.apply(change)
        draft.used.update(hash for hash, _ in chunks)
        if len(chunks) != 1:
            draft.body += self._store_rows(stored, new=not chunks)
        return Outcome(200 if change.before else 201, change.after)

    def _head_of(self, draft: Draft, name: str, chunks: Sequence[tuple[str, int]]) -> bytes:
        """The first bytes of a file, if its media type depends on them."""
        if not chunks or media_type(name, b"") != "application/octet-stream":
            return b""
        if chunks[0][0] in draft.received.heads:
            return draft.received.heads[chunks[0][0]]
        rows = self.db.read("SELECT " + CHUNK + " FROM chunk h WHERE hash = ?", (chunks[0][0],))
        return self.blobs.read(StoredChunk._make(rows[0]))[:32]

    def _admit_step(self, who: Principal, draft: Draft, spot: Spot, path: tuple[str, ...], step: dict[str, Any],
                    **locks: bool) -> None:
        """Check what a step says of the present state, and locks."""
        wanted = step.get("if", ...)
        given = ANY if wanted is ... else Preconditions(if_none_match=("*",)) if wanted is None else Preconditions(if_match=(wanted,))
        try:
            draft.rely_on(self._check_conditions(who, spot, path, given))
        except CloudError as error:
            error.detail["now"] = spot.node
            raise
        if spot.locked:
            self._check_locks(who, spot, ANY, **locks)

    def _take_mkdir(self, who: Principal, draft: Draft, path: tuple[str, ...], step: dict[str, Any]) -> Outcome:
        spot = draft.spot(path)
        if spot.node and spot.node.kind:
            return Outcome(200, spot.node)
        self._check_place(spot, path)
        if spot.node:
            raise CloudError("exists", "a file is at this path", now=spot.node)
        if spot.locked:
            self._check_locks(who, spot, ANY)
        self._check_space(spot, 0, 1)
        node = self._new_collection(spot.home, spot.parent, path[-1])
        draft.apply(Change(None, node, (), spot.chain))
        return Outcome(201, node)

    def _take_move(self, who: Principal, draft: Draft, path: tuple[str, ...], step: dict[str, Any]) -> Outcome:
        target = split_path(step["to"])
        ours, theirs = [key_of(name) for name in path], [key_of(name) for name in target]
        if not target or path == target or theirs[:len(ours)] == ours != theirs:
            raise CloudError("same-place", "one of the two places is, or lies in, the other")
        here = draft.spot(path)
        node = self._found(here)
        self._admit_step(who, draft, here, path, step, below=True, member=True)
        there = draft.spot(target)
        self._check_place(there, target)
        if there.node and there.node.node != node.node:
            raise CloudError("precondition-failed", "there is something at the destination", now=there.node)
        if there.locked:
            self._check_locks(who, there, ANY, below=True, member=True)
        after = node._replace(parent=there.parent, name=target[-1])
        draft.apply(Change(node, after, here.chain, there.chain, "moved"))
        return Outcome(200, after)

    def _take_delete(self, who: Principal, draft: Draft, path: tuple[str, ...], step: dict[str, Any]) -> Outcome:
        spot = draft.spot(path)
        node = self._found(spot)
        self._admit_step(who, draft, spot, path, step, below=True, member=True)
        draft.check_brake()
        if draft.is_made_here(node):
            raise CloudError("conflict", "it was made by this very commit")
        since = step.get("since")
        if since is not None and node.kind:
            others = Statement("SELECT 'changed' FROM journal WHERE home = ? AND seq > ? AND device <> ? LIMIT 1",
                               (who.account, since, who.device))
            if node.seq > since and self.db.read(*others[:2]):
                raise CloudError("precondition-failed", "something has changed since", now=node)
            draft.guards.append(others if self.db.read(*others[:2]) == [] else unchanged(spot))
        draft.apply(self._removal(node, spot))
        return Outcome(204)


COMMIT_STEPS: dict[str, Callable[..., Outcome]] = {
    "put": Sync._take_put, "mkdir": Sync._take_mkdir, "move": Sync._take_move, "delete": Sync._take_delete}
WAITERS, WAITS = 128, 32        # who may wait for changes at a time, per process: in all, and of one account
LOOSE_LIFE = 20 * HOUR          # less than the sweep leaves a chunk alone that nobody refers to
FLUSH = 16 * MiB                # bytes of small chunks that wait in memory for the commit
OWNED = (  # does an account (?, ?) refer to chunk h, now or in its history?
    "EXISTS (SELECT 1 FROM entry WHERE manifest = h.hash AND home = ?) OR EXISTS (SELECT 1 FROM manifest_chunk m "
    "JOIN entry e ON e.manifest = m.manifest WHERE m.chunk = h.hash AND e.home = ?)")
PLACES_AT = (  # what a collection held as of a seq, with the hashes of files of several chunks: :parent, :seq, :after, :limit
    "SELECT " + NODE + ", m.sha256, e.key AS key FROM entry e LEFT JOIN collection c ON c.node = e.node LEFT JOIN manifest m "
    "ON m.id = e.manifest WHERE e.parent = :parent AND e.until IS NULL AND e.key > :after AND e.since <= :seq UNION ALL "
    "SELECT " + NODE + ", m.sha256, e.key AS key FROM entry e LEFT JOIN collection c ON c.node = e.node LEFT JOIN manifest m "
    "ON m.id = e.manifest WHERE e.parent = :parent AND e.until > :seq AND e.key > :after AND e.since <= :seq" + UNPURGED +
    " ORDER BY key LIMIT :limit")


def describe_outcomes(outcomes: Sequence[Outcome], seq: int | None) -> list[dict[str, Any]]:
    """Outcomes as JSON tells them; without a seq, "*" stands for it in the etags that are made of it."""
    mark = "*" if seq is None else "%x" % seq
    found: list[dict[str, Any]] = []
    for status, node, problem in outcomes:
        number = 0 if node is None else node.seq if node.kind else node.rev
        etag = "" if node is None else "%s-%x" % ("%x" % number if number else mark, node.node)
        found.append({"status": status, "etag": etag, **({"node": str(node.node)} if node else {}),
                      **({"problem": problem} if problem else {})})
    return found


def problem_of(error: CloudError) -> dict[str, Any]:
    """What a step was refused for; with it what is there now, if that is the reason."""
    problem = {"code": error.kind, "detail": str(error)}
    if "missing" in error.detail:
        problem["missing"] = error.detail["missing"]
    if error.detail.get("now") is not None:
        now = error.detail["now"]
        problem["now"] = {"node": str(now.node), "etag": now.etag, "kind": "collection" if now.kind else "file"}
    return problem


class Upload(NamedTuple):
    """A resumable upload.  The order is that of the table's columns."""
    id: str
    home: int
    account: int
    root: int                    # where its path begins
    path: str | None             # JSON; None: numbered parts, whose place is named at the end
    given: str                   # JSON: {"if_match": [...], "if_none_match": [...], "parents": bool}
    size: int | None             # announced; None while that is deferred
    mtime: int | None
    note: str                    # what the client wants to hear again: tus metadata
    received: int
    created: int
    due: int                     # forgotten then
    done: str | None             # JSON of what it became


class Writing(NamedTuple):
    """One of several files to write."""
    path: str
    body: Body
    given: Preconditions
    mtime: int | None
    sums: dict[str, str]


KEPT_MOST = 100                 # values that Cloud.keep holds at a time, per account
UPLOAD_LIFE = DAY
PARTS_OPEN = "SELECT 'upload' FROM upload WHERE id = ? AND done IS NULL AND due > ?"
UPLOAD_LIMIT = 1000             # at a time, per account


class Cloud(Sync):
    """The cloud of all accounts: what any door can do, it does by one call here."""

    def numbers(self) -> dict[str, int]:
        """How much there is, for an administrator."""
        names = ("accounts", "seq", "uploads", "locks", "chunks", "bad_chunks")
        counts = self.db.read("SELECT (SELECT count(*) FROM account WHERE removed IS NULL), (SELECT max(seq) FROM journal), "
                              "(SELECT count(*) FROM upload WHERE done IS NULL), (SELECT count(*) FROM lock), "
                              "(SELECT count(*) FROM chunk), (SELECT count(*) FROM chunk WHERE bad IS NOT NULL)")[0]
        usage = shutil.disk_usage(self.config.data)
        return {**dict(zip(names, counts)), "disk_free": usage.free, "disk_total": usage.total}

    def keep(self, who: Principal, value: Any) -> str:
        """Keep, for an hour, what a later request needs and cannot hold in its address; returns what to call it by."""
        id, now = secrets.token_urlsafe(16), self.clock.due()
        if self.db.read("SELECT count(*) FROM kept WHERE account = ? AND due > ?", (who.account, now))[0][0] >= KEPT_MOST:
            raise CloudError("busy", "too much is kept for this account already", retry_after=60)
        self.db.run(Statement("INSERT INTO kept VALUES (?, ?, ?, ?)", (id, who.account, json.dumps(value), now + HOUR)))
        return id

    def kept(self, who: Principal, id: str) -> Any:
        """What was kept under a name.  raises CloudError not-found"""
        rows = self.db.read("SELECT value FROM kept WHERE id = ? AND account = ? AND due > ?", (id, who.account, self.clock.due()))
        if not rows:
            raise CloudError("not-found", "this is not kept any more")
        return json.loads(rows[0][0])

    # ---- resumable uploads: parts go straight into chunks, finishing moves a pointer

    def create_upload(self, who: Principal, path: tuple[str, ...], size: int | None, given: Preconditions = ANY, *,
                      mtime: int | None = None, parents: bool = False, note: str = "") -> Upload:
        """Announce a file that will come in parts; everything that can be refused now is.

        size    bytes; None if not known yet.  What is announced counts against the quota at once.
        """
        self._require(who)
        self._spot_for_file(who, path, given, size or 0, parents)
        self._check_uploads(who)
        now = self.clock.due()
        upload = Upload(secrets.token_urlsafe(16), who.account, who.account, who.root, json.dumps(path),
                        json.dumps({"if_match": given.if_match, "if_none_match": given.if_none_match, "parents": parents,
                                    "beside": given.beside}),
                        size, mtime, note, 0, now, now + UPLOAD_LIFE, None)
        self.db.run(Statement("INSERT INTO upload VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", upload))
        return self._finish_if_whole(who, upload)

    def _check_uploads(self, who: Principal) -> None:
        if len(self.db.read("SELECT 1 FROM upload WHERE home = ? AND done IS NULL", (who.account,))) >= UPLOAD_LIMIT:
            raise CloudError("conflict", "%d uploads are under way already" % UPLOAD_LIMIT)

    def upload(self, who: Principal, id: str, *, numbered: bool = False) -> Upload:
        """Where an upload stands.  raises CloudError not-found for another's too, gone when it has expired"""
        rows = self.db.read("SELECT * FROM upload WHERE id = ? AND account = ? AND root = ? AND (path IS NULL) = ?",
                            (id, who.account, who.root, numbered))
        if not rows:
            raise CloudError("not-found", "there is no such upload")
        upload = Upload._make(rows[0])
        if upload.due <= self.clock.due():
            raise CloudError("gone", "this upload has expired")
        return upload

    def append(self, who: Principal, id: str, offset: int, body: Body, *, size: int | None = None,
               checksum: tuple[str, bytes] | None = None) -> Upload:
        """Take the next part of an upload; returns where it stands then.  What arrived before a break is kept.

        offset    where the part begins; must be where the upload stands
        size      announces the length of the whole, if that was deferred
        checksum  (name, digest) the part must have; if it has not, none of it counts
        raises    CloudError offset, too-large, bad-upload-checksum, and as write when it is whole
        """
        self._require(who)
        upload = self._checked_part(who, self.upload(who, id), offset, body, size)
        digest = new_digest(checksum[0]) if checksum else None
        buffer = bytearray(CHUNK_SIZE if body.length is None else min(CHUNK_SIZE, body.length or 1))
        broken = None
        while broken is None and upload.done is None:
            count, broken = fill_what_comes(body, memoryview(buffer))
            if not count:
                break
            if digest:
                digest.update(memoryview(buffer)[:count])
            if upload.size is not None and upload.received + count > upload.size:
                raise CloudError("too-large", "more came than was announced")
            upload = self._append_chunk(upload, bytes(memoryview(buffer)[:count]))
        if checksum and (broken or digest.digest() != checksum[1]):
            self._cut_back(upload, offset)
            raise broken or CloudError("bad-upload-checksum", "the part does not have the checksum that was announced")
        if broken:
            raise broken
        return self._finish_if_whole(who, upload)

    def _checked_part(self, who: Principal, upload: Upload, offset: int, body: Body, size: int | None) -> Upload:
        if offset != upload.received:
            raise CloudError("offset", "the upload stands at %d" % upload.received, offset=upload.received)
        if size is not None and upload.size not in (None, size):
            raise CloudError("bad-request", "the length was announced as %d" % upload.size)
        if size is not None and upload.size is None:
            self._check_space(self._spot(who, ()), size, size)
            self.db.run(Statement("UPDATE upload SET size = ? WHERE id = ? AND size IS NULL", (size, upload.id)))
            upload = upload._replace(size=size)
        if body.length is not None and upload.size is not None and offset + body.length > upload.size:
            raise CloudError("too-large", "more was sent than was announced")
        self._check_space(self._spot(who, ()), 0, body.length or 1)
        return upload

    def _append_chunk(self, upload: Upload, data: bytes) -> Upload:
        stored = self.blobs.put(Body(data), partial(self._knows, upload.home))
        fresh = upload._replace(received=upload.received + stored.size, due=self.clock.due() + UPLOAD_LIFE)
        self.db.write_once(
            Batch([*self._store_rows(stored),
                   Statement("INSERT INTO upload_chunk VALUES (?, 0, ?, ?, ?)", (upload.id, upload.received, stored.manifest, stored.size)),
                   Statement("UPDATE upload SET received = ?, due = ? WHERE id = ?", (fresh.received, fresh.due, upload.id))],
                  [*self._upload_guards(upload), *still_stored(stored.relied)]),
            CloudError("offset", "another request writes to this upload"))
        return fresh

    def _upload_guards(self, upload: Upload) -> list[Statement]:
        return [Statement("SELECT 'upload' WHERE NOT EXISTS (SELECT 1 FROM upload WHERE id = ? AND received = ? "
                          "AND done IS NULL)", (upload.id, upload.received))]

    def _cut_back(self, upload: Upload, offset: int) -> None:
        self.db.run(Statement("DELETE FROM upload_chunk WHERE upload = ? AND offset >= ?", (upload.id, offset)),
                    Statement("UPDATE upload SET received = ? WHERE id = ? AND done IS NULL", (offset, upload.id)))

    def _finish_if_whole(self, who: Principal, upload: Upload) -> Upload:
        """When all has come: make it a file, in one batch."""
        if upload.size != upload.received or upload.done:
            return upload
        path, how = check_path(json.loads(upload.path)), json.loads(upload.given)
        given = Preconditions(tuple(how["if_match"]), tuple(how["if_none_match"]), beside=how.get("beside", False))
        change, seq = self._finish(who, upload, path, ANY if given == ANY else given, self._assembled(upload), upload.mtime,
                                   parents=how["parents"])
        return upload._replace(done=json.dumps({"node": change.after.node, "rev": seq}))

    def _assembled(self, upload: Upload) -> Stored:
        """What came of an upload so far, as the content of a file."""
        rows = self.db.read("SELECT u.chunk, u.size FROM upload_chunk u WHERE u.upload = ? AND u.size > 0 "
                            "ORDER BY u.part, u.offset", (upload.id,))
        if not rows:
            return self.blobs.put(Body(b""), lambda hash: False)
        manifest, head = manifest_of(rows), self.blobs.read(self._chunk(rows[0][0]))[:32]
        return Stored(manifest, sum(size for _, size in rows), manifest if len(rows) == 1 else None, rows, head=head)

    def _chunk(self, hash: str) -> StoredChunk:
        return StoredChunk._make(self.db.read("SELECT " + CHUNK + " FROM chunk h WHERE hash = ?", (hash,))[0])

    def _finish(self, who: Principal, upload: Upload, path: tuple[str, ...], given: Preconditions, stored: Stored,
                mtime: int | None, *, parents: bool = False) -> tuple[Change, int]:
        """Make what came of an upload the file at a path, in one batch; returns the change and its seq."""
        credit = max(upload.size or 0, upload.received)

        def attempt() -> Batch:
            spot = self._spot_for_file(who, path, given, 0, parents)
            self._check_arrival(spot, stored.size, credit)
            change, made = self._put_change(spot, path, stored, self.clock.wall() if mtime is None else mtime)
            batch = self._batch(who, spot, "write", name_written(path[:-1] + (change.after.name,), spot.node), [*made, change], [
                *self._store_rows(stored, new=not stored.size),
                Statement("DELETE FROM upload_chunk WHERE upload = ?", (upload.id,)),
                Statement("UPDATE upload SET done = ? || (SELECT max(seq) FROM journal) || '}' WHERE id = ?",
                          ('{"node": %d, "rev": ' % change.after.node, upload.id))], credit=credit)
            batch.guards += self._upload_guards(upload)
            return batch

        batch = self.db.write(attempt)
        change = batch.changes[-1]
        return change._replace(after=change.after._replace(since=batch.seq, rev=batch.seq)), batch.seq

    def _check_arrival(self, spot: Spot, size: int, credit: int) -> None:
        """Refuse an upload whose place was not known when room was reserved for it, if its growth does not fit."""
        growth = size - (spot.node.size if spot.node else 0)
        if spot.quota is not None and spot.used + self._reserved(spot.home) - credit + growth > spot.quota and growth > 0:
            raise CloudError("over-quota", "%s are left of the quota" % format_size(max(0, spot.quota - spot.used)))

    def drop_upload(self, who: Principal, id: str) -> None:
        """Forget an upload; its chunks go with the sweep."""
        self._require(who)
        self.upload(who, id)
        self._forget_upload(id)

    def _forget_upload(self, id: str) -> None:
        self.db.run(Statement("DELETE FROM upload_chunk WHERE upload = ?", (id,)),
                    Statement("DELETE FROM upload WHERE id = ?", (id,)))

    # ---- uploads in numbered parts: in any order, in parallel, joined at the end

    def begin_parts(self, who: Principal, name: str, size: int | None = None, path: tuple[str, ...] | None = None, *,
                    again: bool = False) -> None:
        """Announce a file that will come in numbered parts, under a name of the client's choice.

        size, path   of the whole, if the client says so now: what can be refused then is
        again        an upload of that name that is under way will do
        raises       CloudError exists, over-quota, too-large, and as write
        """
        self._require(who)
        if again and self.db.read(PARTS_OPEN, (parts_id(who, name), self.clock.due())):
            return
        spot = self._spot(who, ()) if path is None else self._spot_for_file(who, path, ANY, size or 0, False)
        self._check_parts(spot, size or 0, size or 0)
        self._check_uploads(who)
        now = self.clock.due()
        upload = Upload(parts_id(who, name), who.account, who.account, who.root, None, "{}", size, None, "", 0, now,
                        now + UPLOAD_LIFE, None)

        def attempt() -> Batch:
            if self.db.read(PARTS_OPEN, (upload.id, now)):
                if again:
                    return Batch([])
                raise CloudError("exists", "an upload of this name is under way")
            return Batch([Statement("DELETE FROM upload_chunk WHERE upload = ?", (upload.id,)),
                          Statement("INSERT OR REPLACE INTO upload VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", upload)],
                         [Statement(PARTS_OPEN, (upload.id, now))])

        self.db.write(attempt)

    def _check_parts(self, spot: Spot, growth: int, size: int) -> None:
        """Refuse parts that no file could be made of: all uploads of an account together fit into its quota."""
        self._check_space(spot, 0, size)
        if spot.quota is not None and growth > 0 and self._reserved(spot.home) + growth > spot.quota:
            raise CloudError("over-quota", "uploads under way fill the quota")

    def put_part(self, who: Principal, name: str, number: int, body: Body) -> bool:
        """Take one part, whole or not at all; one that came before is replaced.  Returns whether it is new."""
        self._require(who)
        upload = self._parts(who, name)
        self._check_parts(self._spot(who, ()), max(0, upload.received + (body.length or 0) - (upload.size or 0)), 1)
        stored = self.blobs.put(body, partial(self._knows, upload.home))
        key, rows, offset = (upload.id, number), [], 0
        for hash, size in stored.chunks:
            rows.append((*key, offset, hash, size))
            offset += size
        there = bool(self.db.read("SELECT 1 FROM upload_chunk WHERE upload = ? AND part = ? LIMIT 1", key))
        self.db.write(lambda: Batch([
            Statement(CHUNK_ROWS, self._chunk_rows(stored), many=True),
            Statement("UPDATE upload SET due = ?4, received = received + ?3 - (SELECT coalesce(sum(size), 0) FROM upload_chunk "
                      "WHERE upload = ?1 AND part = ?2) WHERE id = ?1", (*key, stored.size, self.clock.due() + UPLOAD_LIFE)),
            Statement("DELETE FROM upload_chunk WHERE upload = ? AND part = ?", key),
            Statement("INSERT INTO upload_chunk VALUES (?, ?, ?, ?, ?)", rows, many=True)],
            [*self._part_guards(who, name), *still_stored(stored.relied)]))
        return not there

    def _part_guards(self, who: Principal, name: str) -> list[Statement]:
        id = self._parts(who, name).id                       # looked up again at every attempt
        return [Statement("SELECT 'upload' WHERE NOT EXISTS (SELECT 1 FROM upload WHERE id = ? AND done IS NULL)", (id,))]

    def _parts(self, who: Principal, name: str) -> Upload:
        """raises CloudError not-found when it is unknown, or joined"""
        upload = self.upload(who, parts_id(who, name), numbered=True)
        if upload.done:
            raise CloudError("not-found", "there is no such upload")
        return upload

    def parts(self, who: Principal, name: str) -> tuple[Upload, list[tuple[int, int]]]:
        """An upload in numbered parts, and (number, bytes) of each that has come."""
        upload = self._parts(who, name)
        return upload, self.db.read("SELECT part, sum(size) FROM upload_chunk WHERE upload = ? GROUP BY part ORDER BY part",
                                    (upload.id,))

    def drop_parts(self, who: Principal, name: str, number: int | None = None) -> None:
        """Forget an upload in numbered parts, or one of them.  raises CloudError not-found"""
        self._require(who)
        upload, parts = self.parts(who, name)
        if number is None:
            return self._forget_upload(upload.id)
        if number not in dict(parts):
            raise CloudError("not-found", "there is no such part")
        self.db.run(Statement("UPDATE upload SET received = received - ? WHERE id = ?", (dict(parts)[number], upload.id)),
                    Statement("DELETE FROM upload_chunk WHERE upload = ? AND part = ?", (upload.id, number)))

    def join_parts(self, who: Principal, name: str, path: tuple[str, ...], given: Preconditions = ANY, *,
                   size: int | None = None, mtime: int | None = None, sums: dict[str, str] | None = None) -> tuple[Node, bool]:
        """Make the parts, in the order of their numbers, the content of a file; returns it and whether it is new.

        Asked again, for the answer got lost, it returns the file it made.
        raises  CloudError bad-request if bytes are missing, bad-checksum, and as write; the parts stay then
        """
        self._require(who)
        upload = self.upload(who, parts_id(who, name), numbered=True)
        if upload.done:
            made, node = json.loads(upload.done), self.find(who, path)
            if node is None or (node.node, node.rev) != (made["node"], made["rev"]):
                raise CloudError("not-found", "there is no such upload")
            return node, True
        self._spot_for_file(who, path, given, 0, False)
        stored, wanted = self._assembled(upload), upload.size if size is None else size
        if wanted not in (None, stored.size):
            raise CloudError("bad-request", "%d bytes came, %d were announced" % (stored.size, wanted))
        if sums:
            self._check_sums(stored, sums)
        change, _ = self._finish(who, upload, path, given, stored, mtime)
        return change.after, change.before is None

    def _check_sums(self, stored: Stored, sums: dict[str, str]) -> None:
        """Read what came in parts and compare; its SHA-256 is known then, too."""
        digests = {name: new_digest(name) for name in {"sha256", *sums}}
        for hash, _ in stored.chunks:
            data = self.blobs.read(self._chunk(hash))
            for digest in digests.values():
                digest.update(data)
        found = {name: digest.hexdigest() for name, digest in digests.items()}
        stored.sha256 = found["sha256"]
        stored.digests = {name: found[name] for name in sums if name != "sha256"}
        if any(found[name] != value for name, value in sums.items()):
            raise CloudError("bad-checksum", "what arrived does not have the checksum that was announced")

    def write_each(self, who: Principal, files: Iterable["Writing"]) -> Iterator[tuple[str, Node | CloudError]]:
        """Write files one after the other; (path as given, what became of it) of each."""
        for path, body, given, mtime, sums in files:
            try:
                outcome: Node | CloudError = self.write(who, split_path(path), body, given, mtime=mtime, sums=sums)[0]
            except CloudError as error:
                outcome = error
            yield path, outcome

    # ---- requests that may come twice

    def once(self, op: str, verb: Callable[["Cloud"], Any]) -> Any:
        """Do a verb with a cloud whose batch bears an operation id; None if that was done before, in the last minute or two.

        A client whose connection broke before the answer sends the same again; the id is in the database by then, so
        it does not matter which server it asks.
        """
        if self.done(op) is None:
            view = object.__new__(type(self))
            view.__dict__.update(self.__dict__, op=(op_ids(op, self.clock.due())[0], ""))
            try:
                return verb(view)
            except CloudError:
                if self.done(op) is None:
                    raise
        return None

    def done(self, op: str) -> int | None:
        """The seq of the batch that bears an operation id."""
        rows = self.db.read("SELECT seq FROM op WHERE id IN (?, ?)", op_ids(op, self.clock.due()))
        return rows[0][0] if rows else None


def op_ids(op: str, now: int) -> tuple[str, str]:
    """Names of an operation in this minute and in the one before: an id counts no longer than that."""
    return "%s %d" % (op, now // MINUTE), "%s %d" % (op, now // MINUTE - 1)


def parts_id(who: Principal, name: str) -> str:
    """The id of an upload that a client named; no other kind has colons."""
    return "%d:%d:%s" % (who.account, who.root, name)


# ==== 8. HTTP ============================================================================
#
# The only code that touches a socket.  1. One parser, one path function, one gate for every request.
# 2. An answer is one send if it is small.  3. An unread body never becomes the next request: it is drained, up to
# a limit, or the connection ends.  4. A framing error ends the connection.  5. A failure after the first byte of a
# body cuts the connection: a part never looks whole.

HEADER_TIME, IDLE_TIME, STALL_TIME, HANDSHAKE_TIME = 20, 75, 60, 10     # seconds (R34)
LINGER_TIME, SMALL_BODY_TIME = 2, 20
BODY_WINDOW, BODY_RATE = 30, KiB        # a body brings at least this many bytes/s over each window, seconds
LONG = 1                                # seconds after which work for somebody who has left is given up
SMALL_BODY = 16 * KiB                   # most that somebody who is not let in may send
TICK = 1                                # seconds a thread waits for a silent connection before it is parked
DRAIN_LIMIT = 256 * KiB
RECEIVE = 64 * KiB
THREADS, WAITING = 256, 256             # connections answered at a time, and waiting for that, per process
SHARE = 64                              # ... of one account, or of one address that is not let in
SILENT = (BlockingIOError, socket.timeout, ssl.SSLWantReadError, ssl.SSLWantWriteError)     # nothing came for a tick
REASONS = {**{status.value: status.phrase for status in HTTPStatus}, 460: "Checksum Mismatch"}
STATUS_LINES = {status: "HTTP/1.1 %d %s\r\n" % (status, reason) for status, reason in REASONS.items()}
ALWAYS = "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
PRIVATE = "private, no-cache"
SANDBOX = "sandbox; default-src 'none'"


class Disconnected(Exception):
    """The peer went away, or is too slow to be waited for."""


class Request:
    """One request, parsed and checked; what a handler sees of HTTP."""
    __slots__ = ("method", "path", "slash", "query", "fields", "minor", "body", "address", "https", "safe", "site", "who",
                 "id", "values", "gone", "began", "prefix", "refusal", "share")

    def __init__(self, method: str, path: tuple[str, ...], slash: bool, query: str, fields: dict[str, str], minor: int,
                 body: Body, address: str, https: bool, safe: bool, site: "Site | None" = None) -> None:
        self.method, self.path, self.slash, self.query, self.fields = method, path, slash, query, fields
        self.minor, self.body = minor, body
        self.address = address           # of the client, seen through listed proxies
        self.https = https               # did the client speak HTTPS?
        self.safe = safe                 # may a password travel this way?
        self.site = site                 # knows the names of this server
        self.who = ANONYMOUS             # for the access log
        self.id = ""                     # names the request in the log, if it fails
        self.values: dict[str, Any] = {} # declared arguments of the route
        self.gone: Callable[[], bool] = lambda: False    # has the client closed its side?
        self.began = time.monotonic()
        self.prefix: tuple[str, ...] = ()        # what a proxy cuts off every address: a server below /cloud/
        self.refusal: CloudError | None = None   # why its target is none, if it is
        self.share: Any = None                   # whose share of this process it has, until it is answered

    def href(self, address: Sequence[str]) -> str:
        """An address of this server as the client has to write it."""
        return format_path((*self.prefix, *address))

    def check_alive(self, seconds: float = math.inf) -> None:
        """Go on?  Whoever works long for an answer asks now and then.

        In the first second nobody counts as gone: a client may close its sending side and wait for a short answer.
        raises  Disconnected when the client has left; CloudError busy when it took longer than `seconds`
        """
        taken = time.monotonic() - self.began
        if taken > seconds:
            raise CloudError("busy", "this takes too long; ask for less", retry_after=60)
        if taken > LONG and self.gone():
            raise Disconnected

    def __getitem__(self, name: str) -> str | None:
        """A header field by its name in lower case."""
        return self.fields.get(name)

    @property
    def cookie(self) -> str:
        """The session's cookie, or ""."""
        wanted = "__Host-session" if self.https else "session"
        for part in self.fields.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == wanted:
                return value
        return ""

    def argument(self, name: str) -> str | None:
        """A value of the query."""
        return parse_query(self.query).get(name) if self.query else None


class Response:
    """One answer.  body: bytes, or pieces to send one after the other; length: of all pieces, None if unknown."""
    __slots__ = ("status", "fields", "body", "length", "close")

    def __init__(self, status: int = 200, body: bytes | Iterator[bytes | FileSlice] = b"",
                 fields: dict[str, str] | None = None, *, length: int | None = None) -> None:
        self.status, self.body, self.fields = status, body, fields if fields is not None else {}
        self.length = len(body) if isinstance(body, bytes) else length
        self.close = False


class Route(NamedTuple):
    """A row of the route table."""
    method: str
    pattern: str
    handler: Callable[..., Response]
    needs: str
    refuse: Callable[[CloudError, Request], Response]
    values: dict[str, str]               # declared arguments: {"path": "string", "parents?": "boolean"}
    tail: str                            # the name of the last part, if it is a variable
    many: bool                           # ... that takes all the rest of the path
    packs: bool                          # may its answers be compressed?


# ---- the table of routes, and the gate

NEEDS = {  # what a route may demand of who knocks: (test, refusal)
    "nothing": (lambda who, now: True, None),
    "read": (lambda who, now: who.account, "unauthenticated"),
    "write": (lambda who, now: not who.readonly, "forbidden"),
    "account": (lambda who, now: who.means in ("password", "session"), "forbidden"),
    "password": (lambda who, now: who.means == "password", "forbidden"),
    "fresh": (lambda who, now: who.confirmed >= now, "unconfirmed"),
    "admin": (lambda who, now: who.admin and who.means in ("password", "session"), "forbidden"),
}
UNSAFE = METHODS - {"GET", "HEAD", "OPTIONS", "PROPFIND", "REPORT", "SEARCH"}
ROUTES: dict[str, Any] = {}              # a tree: names to trees; "" holds {method: Route} of the place itself


def route(methods: str, pattern: str, *, needs: str, refuse: Callable[[CloudError, Request], Response] | None = None,
          packs: bool = False, **values: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Enter a handler in ROUTES.

    pattern  "/a/b", "/a/<name>" or "/dav/<path>", whose last part takes the rest, decoded
    needs    words of NEEDS, looked at in this order; all but "nothing" imply "read"
    packs    answers may be compressed: large ones that hold no secret beside what the asker can choose, as its length
             would tell it piece by piece (BREACH)
    values   declared arguments, of the query for GET, else of a JSON body; `name_` is optional
    """
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        parts = pattern.strip("/").split("/") if pattern != "/" else []
        tail = parts.pop()[1:-1] if parts and parts[-1].startswith("<") else ""
        place = ROUTES
        for part in parts:
            place = place.setdefault(part, {})
        key = "<path>" if tail == "path" else "<>" if tail else ""
        for method in methods.split():
            place.setdefault(key, {})[method] = Route(method, pattern, handler, needs, refuse or json_error, values, tail,
                                                      tail == "path", packs)
        return handler
    return enter


def find_route(request: Request) -> tuple[Route, dict[str, Any]]:
    """The route of a request and the variables in its path.  raises CloudError not-found, method-not-allowed"""
    place, path, best = ROUTES, request.path, None
    for depth in range(len(path) + 1):
        if "<path>" in place:
            best = place["<path>"], path[depth:]
        if depth == len(path):
            if "" in place:
                best = place[""], None
        elif "<>" in place and depth == len(path) - 1 and path[depth] not in place:
            best = place["<>"], path[depth]
            break
        elif path[depth] in place:
            place = place[path[depth]]
            continue
        break
    if best is None:
        raise CloudError("not-found", "there is nothing at this address")
    methods, rest = best
    found = methods.get(request.method) or (methods.get("GET") if request.method == "HEAD" else None)
    if found is None:
        allow = sorted({*methods, *(("HEAD",) if "GET" in methods else ()), "OPTIONS"})
        if request.method == "OPTIONS":
            return Route("OPTIONS", "", lambda cloud, who, request: Response(204, fields={"Allow": ", ".join(allow)}),
                         "nothing", json_error, {}, "", False, False), {}
        raise CloudError("method-not-allowed", "try %s" % ", ".join(allow), allow=", ".join(allow),
                         refuse=next(iter(methods.values())).refuse)
    return found, {found.tail: rest} if found.tail else {}


def respond(cloud: Cloud, request: Request) -> Response:
    """Answer one request.  Every request takes these steps, in this order, and no others."""
    refuse = json_error
    try:
        who = request.who = cloud.accounts.identify(
            request.fields.get("authorization", ""), request.cookie if "cookie" in request.fields else "",
            request.address, secure=request.safe)
        found, names = find_route(request)
        refuse = found.refuse
        if request.refusal:
            raise request.refusal
        take_share(who, request)
        if not who.account:
            request.body.wait_if_small(SMALL_BODY)
        admit(cloud, who, request, found)
        if not who.account:
            request.body.insist(SMALL_BODY)
        if found.values:
            request.values = read_values(request, found.values)
        response = found.handler(cloud, who, request, **names)
        return pack(request, response) if found.packs else response
    except CloudError as error:
        if error.kind == "storage-failed":
            log.error("%s %s: %s", request.method, format_path(loggable(request.path)), error)
        return error.detail.get("refuse", refuse)(request.refusal or error, request)
    except (Disconnected, Await):
        raise                            # there is nobody to answer, or not yet
    except Exception:
        request.id = secrets.token_hex(4)
        log.exception("request %s: %s /%s", request.id, request.method, "/".join(request.path[:1]))
        return refuse(CloudError("internal"), request)


def loggable(path: tuple[str, ...]) -> tuple[str, ...]:
    """A path without what opens something: tokens of share links, uploads and logins."""
    for opener in OPENERS:
        if path[:len(opener)] == opener:
            return opener + ("...",) * (len(path) > len(opener)) + path[len(opener) + 1:]
    return path


OPENERS = (("s",), ("tus",), ("api", "v1", "grants"), ("login", "v2", "flow"))        # a secret follows


def take_share(who: Principal, request: Request) -> None:
    """Have a part of what this process can do at a time, until the answer has gone.  raises CloudError busy"""
    if request.site:
        key = who.account or network_of(request.address)
        request.site.shares.take(key)
        request.share = key


def admit(cloud: Cloud, who: Principal, request: Request, found: Route) -> None:
    """May they knock here?  raises CloudError"""
    if found.needs != "nothing":
        if not who.account:
            if not cloud.accounts.is_set_up() and found.pattern[:5] != "/dav/":
                raise CloudError("not-set-up", "this server is not set up yet; open the link it printed when it started")
            raise who.refusal or CloudError("unauthenticated", "log in first")
        for need in found.needs.split():
            test, refusal = NEEDS[need]
            if not test(who, cloud.clock.due()):
                raise CloudError(refusal, "give the password again" if refusal == "unconfirmed" else
                                 "this is not allowed with these credentials")
    if request.method in UNSAFE or found.needs == "password":        # Nextcloud's clients get an app password by GET
        check_origin(who, request)


def check_origin(who: Principal, request: Request) -> None:
    """Refuse what a foreign page makes a browser send (B1)."""
    origin, site = request["origin"], request["sec-fetch-site"]
    own = origin is not None and origin.partition("://")[2] == request.fields.get("host")
    if origin is not None and not own or site not in (None, "same-origin", "none"):
        raise CloudError("cross-site", "this came from another site")
    if who.means == "session" and not (request["x-requested-by"] and (own or site == "same-origin")):
        raise CloudError("cross-site", "a browser must say where this came from")


IN_QUERY = ("GET", "HEAD", "PUT", "DELETE")      # methods whose declared arguments stand in the query
TEXT_VALUES = {"integer": lambda text: int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text,
               "boolean": lambda text: {"1": True, "true": True, "0": False, "false": False}.get(text, text)}


def is_integer(value: Any) -> bool:
    return type(value) is int and -INTEGERS <= value < INTEGERS


def of_type(name: str, test: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not test(value):
            raise CloudError("bad-request", "it must be of type " + name)
        return value
    return check


def each(read: Callable[[Any], Any], most: int = OPS_LIMIT) -> Callable[[Any], list[Any]]:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise CloudError("bad-request", "it must be an array of at most %d" % most)
        return list(map(read, value))
    return check


def read_moment(value: Any) -> tuple[str, int]:
    """A moment: ("seq", number of a write) of "seq:123", or else ("at", ms since 1970)."""
    if isinstance(value, str) and re.fullmatch("seq:[0-9]{1,18}", value):
        return "seq", int(value[4:])
    return "at", parse_time(value)


def read_transfer(value: Any) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    if not isinstance(value, dict) or not {"from", "to"} <= set(value) <= {"from", "to", "clash"}:
        raise CloudError("bad-request", 'an item is {"from": path, "to": path}, perhaps with a "clash" of its own')
    return split_path(value["from"]), split_path(value["to"]), read_clash(value.get("clash", ""))


def read_clash(value: Any) -> str:
    if value not in ("", "refuse", "replace", "keep"):
        raise CloudError("bad-request", "clash is refuse, replace or keep")
    return value


def read_hash(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise CloudError("bad-request", "a hash is a SHA-256 in hex")
    return value


def read_chunk_of_file(value: Any) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2 or not is_integer(value[1]) or not 0 < value[1] <= CHUNK_LIMIT:
        raise CloudError("bad-request", "chunks are [[SHA-256 in hex, bytes], ...]")
    return read_hash(value[0]), value[1]


STRING = {"type": "string"}
VALUES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {      # what can be declared: how it is read; its JSON Schema
    "string": (of_type("string", lambda value: isinstance(value, str)), STRING),
    "integer": (of_type("integer", is_integer), {"type": "integer", "format": "int64"}),
    "boolean": (of_type("boolean", lambda value: isinstance(value, bool)), {"type": "boolean"}),
    "array": (of_type("array", lambda value: isinstance(value, list)), {"type": "array", "items": {}}),
    "path": (split_path, STRING), "paths": (each(split_path, PAGE_LIMIT), {"type": "array", "items": STRING}),
    "id": (parse_id, STRING), "ids": (each(parse_id, PAGE_LIMIT), {"type": "array", "items": STRING}),
    "time": (parse_time, {"type": ["string", "integer"]}), "moment": (read_moment, {"type": ["string", "integer"]}),
    "transfers": (each(read_transfer, PAGE_LIMIT), {"type": "array", "items": {
        "type": "object", "properties": {"from": STRING, "to": STRING, "clash": STRING}, "required": ["from", "to"]}}),
    "hashes": (each(read_hash), {"type": "array", "items": STRING}),
    "chunks": (each(read_chunk_of_file, 100_000), {"type": "array", "items": {"type": "array"}}),
    "etag": (of_type("string, or null", lambda value: value is None or isinstance(value, str)), {"type": ["string", "null"]}),
}


def check_fields(values: Any, declared: dict[str, str]) -> dict[str, Any]:
    """An object of which each field is declared, read as what it is; `name_` may be missing or null.  raises CloudError

    Everything that JSON and queries bring passes here, once; what handlers get has its type, range and encoding (A1).
    """
    if not isinstance(values, dict):
        raise CloudError("bad-request", "it must be an object")
    found, kinds = {}, {name.rstrip("_"): kind for name, kind in declared.items()}
    for name, value in values.items():
        if name not in kinds:
            raise CloudError("bad-request", "unknown argument: %s" % name[:64])
        try:
            found[name] = None if value is None and name + "_" in declared else VALUES[kinds[name]][0](value)
        except CloudError as error:
            raise CloudError(error.kind, "%s: %s" % (name[:64], error)) from None
    for name in declared:
        if name[-1] != "_" and name not in values:
            raise CloudError("bad-request", "missing argument: %s" % name)
    return found


def read_values(request: Request, declared: dict[str, str]) -> dict[str, Any]:
    """The arguments a route declares, and no others; None for those that may be missing."""
    if request.method in IN_QUERY:
        values, kinds = {}, {name.rstrip("_"): kind for name, kind in declared.items()}
        for name, text in parse_pairs(request.query):
            if VALUES[kinds.get(name, "string")][1]["type"] == "array":
                values.setdefault(name, []).append(text)
            else:
                values[name] = TEXT_VALUES.get(kinds.get(name, ""), str)(text)
    else:
        values = parse_json(request.body.read(JSON_LIMIT) or b"{}")
    return {**{name[:-1]: None for name in declared if name[-1] == "_"}, **check_fields(values, declared)}


# ---- answers that several doors give

def json_response(value: Any, status: int = 200, **fields: str) -> Response:
    return Response(status, format_json(value), {"Content-Type": "application/json; charset=utf-8",
                                                 "Cache-Control": "no-store", **fields})


PACK_LEAST = 2 * KiB            # bytes; less would not travel faster
PACKED = "-gz"                  # ends the ETag of an answer that was compressed: other bytes, another tag


def pack(request: Request, response: Response) -> Response:
    """The answer, compressed if the client takes that and it is large (RFC 9110 s8.4, s12.5.3)."""
    response.fields["Vary"] = "Accept-Encoding"
    if (isinstance(response.body, bytes) and len(response.body) >= PACK_LEAST
            and takes_gzip(request.fields.get("accept-encoding", ""))):
        response.body = gzip.compress(response.body, 4, mtime=0)
        response.length = len(response.body)
        response.fields["Content-Encoding"] = "gzip"
        if "ETag" in response.fields:
            response.fields["ETag"] = '%s%s"' % (response.fields["ETag"][:-1], PACKED)
    return response


@lru_cache(maxsize=64)
def takes_gzip(field: str) -> bool:
    """Does an Accept-Encoding field ask for gzip?"""
    weights = {name.strip().lower(): weight for name, _, weight in (part.partition(";") for part in field.split(","))}
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*")))
    return weight is not None and not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight, re.I)


def json_error(error: CloudError, request: Request) -> Response:
    """A problem document (RFC 9457)."""
    problem = {"type": "about:blank", "title": REASONS[error.status], "status": error.status, "code": error.kind,
               "detail": str(error)}
    for name in ("missing", "now", "offset"):
        if name in error.detail:
            problem[name] = error.detail[name]
    if request.id:
        problem["request"] = request.id
    response = Response(error.status, format_json(problem), {
        "Content-Type": "application/problem+json; charset=utf-8", "Cache-Control": "no-store", **error_fields(error)})
    if error.status == 401 and (request["x-requested-by"] or request.cookie or request["sec-fetch-site"] == "same-origin"):
        # the page is asking, perhaps for a picture or for events; at "Basic" the browser would open a window of its own
        response.fields["WWW-Authenticate"] = 'Session realm="cloudserver"'
    response.close = error.close
    return response


def error_fields(error: CloudError) -> dict[str, str]:
    """Header fields that go with a refusal, whatever its dialect."""
    fields = {}
    if error.status == 401:
        fields["WWW-Authenticate"] = 'Basic realm="cloudserver", charset="UTF-8"'
    if "allow" in error.detail:
        fields["Allow"] = error.detail["allow"]
    if "retry_after" in error.detail:
        fields["Retry-After"] = str(error.detail["retry_after"])
    if error.kind == "range-unsatisfiable":
        fields["Content-Range"] = "bytes */%d" % error.detail["size"]
    return fields


def read_conditions(request: Request) -> Preconditions:
    """The conditions of RFC 9110 s13 in a request."""
    fields = request.fields
    if not ("if-match" in fields or "if-none-match" in fields or "if-unmodified-since" in fields
            or "if-modified-since" in fields):
        return ANY
    return Preconditions(
        parse_etags(fields["if-match"], weak=False) if "if-match" in fields else (),
        parse_etags(fields["if-none-match"], weak=True) if "if-none-match" in fields else (),
        parse_http_date(fields.get("if-unmodified-since", "")), parse_http_date(fields.get("if-modified-since", "")))


def kept_response(request: Request, body: bytes, fields: dict[str, str]) -> Response:
    """An answer that is asked for anew each time and sent only when it changed: its ETag is made of its bytes."""
    etag = hashlib.sha256(body).hexdigest()[:16]
    given = read_conditions(request).if_none_match
    held = next((tag for tag in (etag, etag + PACKED) if tag in given), etag if "*" in given else None)
    return Response(200 if held is None else 304, body if held is None else b"", {**fields, "ETag": '"%s"' % (held or etag)})


def content_response(request: Request, node: Node, content: Content) -> Response:
    """Serve a version of a file: conditions, ranges and safe headers (RFC 9110 s13, s14; W1)."""
    etag = '"%s"' % node.etag
    fields = {"ETag": etag, "Last-Modified": format_http_date(node.mtime), "Accept-Ranges": "bytes",
              "Cache-Control": PRIVATE}
    given = read_conditions(request)
    if given is not ANY:
        answer = unmet(given, node)
        if answer == 304:
            return Response(304, b"", fields)
        if answer:
            raise CloudError("precondition-failed", "it has changed")
    media = node.media or "application/octet-stream"
    plain = media.startswith("text/") and media != "text/html"
    fields["Content-Type"] = "text/plain; charset=utf-8" if plain else media
    fields["Content-Disposition"] = format_disposition(node.name, inline=plain or media in INLINE_MEDIA)
    fields["Content-Security-Policy"] = SANDBOX
    fields["Cross-Origin-Resource-Policy"] = "same-origin"
    if "range" in request.fields and request.method == "GET" and may_range(request["if-range"], node):
        ranges = parse_ranges(request["range"], node.size)
        if ranges:
            return range_response(fields, content, ranges)
    if request.method == "HEAD":
        return Response(200, iter(()), fields, length=node.size)
    data = content.inline()
    if data is not None:
        return Response(200, data, fields)
    return Response(200, begun(content.slices()), fields, length=content.size)


def begun(parts: Iterator[bytes | FileSlice]) -> Iterator[bytes | FileSlice]:
    """The same pieces, the first of which is there: if it is damaged, the answer can still say so."""
    return itertools.chain(list(itertools.islice(parts, 1)), parts)


def unmet(given: Preconditions, node: Node) -> int:
    """The status by which a read with these conditions is answered, or 0 if they hold (RFC 9110 s13.2.2)."""
    if given.if_match:
        if "*" not in given.if_match and node.etag not in given.if_match:
            return 412
    elif given.unmodified_since is not None and node.mtime // 1000 * 1000 > given.unmodified_since:
        return 412
    if given.if_none_match:
        return 304 if "*" in given.if_none_match or node.etag in given.if_none_match else 0
    return 304 if given.modified_since is not None and node.mtime // 1000 * 1000 <= given.modified_since else 0


def may_range(validator: str | None, node: Node) -> bool:
    """Does an If-Range field, if any, name this very version? (RFC 9110 s13.1.5)"""
    if validator is None:
        return True
    if validator.startswith('"'):
        return validator == '"%s"' % node.etag
    return parse_http_date(validator) == node.mtime // 1000 * 1000


def range_response(fields: dict[str, str], content: Content, ranges: list[tuple[int, int]]) -> Response:
    """206 with one part, or several as multipart/byteranges (RFC 9110 s14.6)."""
    if len(ranges) == 1:
        start, stop = ranges[0]
        fields["Content-Range"] = "bytes %d-%d/%d" % (start, stop - 1, content.size)
        return Response(206, begun(content.slices(start, stop)), fields, length=stop - start)
    boundary = secrets.token_hex(12)
    heads = ["\r\n--%s\r\nContent-Type: %s\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (
        boundary, fields["Content-Type"], start, stop - 1, content.size) for start, stop in ranges]
    end = ("\r\n--%s--\r\n" % boundary).encode()
    length = sum(len(head) + stop - start for head, (start, stop) in zip(heads, ranges)) + len(end)

    def parts() -> Iterator[bytes | FileSlice]:
        for head, (start, stop) in zip(heads, ranges):
            yield head.encode()
            yield from content.slices(start, stop)
        yield end

    fields["Content-Type"] = "multipart/byteranges; boundary=" + boundary
    return Response(206, parts(), fields, length=length)


class Spool:
    """An answer that is built before it is sent: in memory while small, else in a nameless file.

    So a listing of any length is made at the speed of this machine under one snapshot, has a length, and fails
    as a whole if it fails.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MiB)

    def write(self, text: str) -> None:
        self._file.write(text.encode("utf-8"))

    def response(self, status: int, fields: dict[str, str]) -> Response:
        length = self._file.tell()
        self._file.seek(0)
        if length <= MiB:
            return Response(status, self._file.read(), fields)
        return Response(status, iter([FileSlice(self._file, 0, length)]), fields, length=length)


# ---- where a request comes from

_KNOWN_HOST = re.compile(r"\[[0-9a-f:.]+\]|\d{1,3}(?:\.\d{1,3}){3}|localhost")


class Site:
    """What the operator said about names and proxies, ready for use on every request."""

    def __init__(self, config: Config) -> None:
        self.proxies = [ipaddress.ip_network(text.strip(), strict=False)
                        for text in config.behind_proxy.split(",") if text.strip()]
        own = socket.gethostname().lower()
        self.names = {own, own.partition(".")[0], own.partition(".")[0] + ".local",
                      *(name.strip().lower() for name in config.hostname.split(",") if name.strip())}
        self.plain_http = config.plain_http
        self.shares = Shares(SHARE, "%d requests of yours are under way already", 2)
        self.knows = lru_cache(maxsize=256)(self._knows)

    def _knows(self, host: str) -> bool:
        """May a client call this server by that name?  Anything else may be a page that re-pointed its own (B3)."""
        name = host.lower()
        name = name if name[-1] == "]" else name.rpartition(":")[0] or name
        return bool(_KNOWN_HOST.fullmatch(name)) or name.rstrip(".") in self.names

    def locate(self, peer: str, tls: bool, fields: dict[str, str]) -> tuple[str, bool, bool]:
        """(the client's address, whether it speaks HTTPS, whether a password may travel that way) (N4, N5).

        raises CloudError for what a listed proxy says badly, or by half: the client might pass for the proxy, and be trusted
        """
        hops, scheme = fields.get("x-forwarded-for"), fields.get("x-forwarded-proto")
        if hops is None and scheme is None or not self._is_proxy(peer):
            return peer, tls, tls or self.plain_http or peer == "127.0.0.1" or ipaddress.ip_address(peer).is_loopback
        if hops is None or (scheme or "").lower() not in ("http", "https"):
            raise CloudError("bad-request", "the proxy must send both X-Forwarded-For and X-Forwarded-Proto, http or https")
        for hop in reversed(hops.split(",")):
            address = parse_hop(hop)
            if not self._is_proxy(address):
                break
        https = scheme.lower() == "https"
        return address, https, https or self.plain_http

    def prefix(self, peer: str, fields: dict[str, str]) -> tuple[str, ...]:
        """The path below which a proxy shows this server, as its X-Forwarded-Prefix tells; () if it tells none (N4)."""
        given = fields.get("x-forwarded-prefix", "")
        if not given or not self._is_proxy(peer):
            return ()
        _, path, _, _, refusal = read_target(given)
        return () if refusal else path

    def _is_proxy(self, address: str) -> bool:
        return bool(self.proxies) and any(ipaddress.ip_address(address) in network for network in self.proxies)


# ---- the parser: bytes in, requests out, no socket (RFC 9112)

_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_BARE = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\x00")


class Parser:
    """What came of a connection and is not used yet: heads, lines and bytes of bodies out of it.

    What is not there whole is None: feed more and ask again.  Errors are CloudErrors that end the connection.
    """
    __slots__ = ("data", "at", "_begun")

    def __init__(self) -> None:
        self.data, self.at = b"", 0
        self._begun = False                      # the empty line that may come before a request has come

    def __len__(self) -> int:
        """Bytes that are there."""
        return len(self.data) - self.at

    def feed(self, more: bytes) -> None:
        self.data, self.at = self.data[self.at:] + more if self.at < len(self.data) else more, 0

    def head(self) -> bytes | None:
        """The next head, up to and with its empty line.  raises CloudError for what can never become one (H5, H6)"""
        if not self._begun and self.data.startswith(b"\r\n", self.at):
            self.at, self._begun = self.at + 2, True             # at most one empty line before a request
        end = self.data.find(b"\r\n\r\n", self.at)
        if 0 <= end - self.at <= HEAD_LIMIT:
            found = self.data[self.at:end + 4]
            self.at, self._begun = end + 4, False
            return found
        if len(self):
            self._check_partial_head(self.data[self.at:])
        return None

    def _check_partial_head(self, data: bytes) -> None:
        if _BARE.search(data):
            raise refuse_head("bad-request", "lines end in CRLF")
        if data.find(b"\r\n", 0, LINE_LIMIT) < 0 and len(data) > LINE_LIMIT:
            raise refuse_head("uri-too-long", "request line over %d bytes" % LINE_LIMIT)
        if len(data) > HEAD_LIMIT:
            raise refuse_head("headers-too-large", "header over %d bytes" % HEAD_LIMIT)

    def line(self, limit: int) -> bytes | None:
        """A line of a chunked body without its CRLF.  raises CloudError if it is longer than `limit`"""
        end = self.data.find(b"\r\n", self.at, self.at + limit + 2)
        if end >= 0:
            line, self.at = self.data[self.at:end], end + 2
            return line
        if len(self) > limit + 1:
            raise refuse_head("bad-request", "malformed chunk")
        return None

    def take(self, buffer: memoryview) -> int:
        """Fill some of `buffer`; returns how much."""
        count = min(len(self), len(buffer))
        buffer[:count] = memoryview(self.data)[self.at:self.at + count]
        self.at += count
        return count


class Source:
    """Where a body comes from beyond what the parser has: a connection, in tests a list of bytes."""

    def receive_into(self, buffer: memoryview) -> int:
        """Fill some of `buffer`, at least a byte.  raises CloudError if nothing will come"""
        raise NotImplementedError

    def send_continue(self) -> None:
        """Tell the client to go on (RFC 9110 s10.1.1)."""


class Await(Exception):
    """The request is answered once all of its body is there: that of somebody who is not let in keeps nobody waiting."""

    def __init__(self, count: int) -> None:
        self.count = count                       # bytes that have to be there


class RequestBody(Body):
    """A body as it comes, by length or in chunks (RFC 9112 s6, s7)."""

    def __init__(self, parser: Parser, source: Source, length: int | None, expect: bool) -> None:
        self.length, self.parser, self.source = length, parser, source
        self.expect = expect                     # 100 Continue is still to be sent
        self.left = length or 0                  # bytes of the body, or of the present chunk
        self.ended = length == 0
        self.overhead = 0                        # bytes of chunk extensions and trailers seen

    def readinto(self, buffer: memoryview) -> int:
        if self.ended:
            return 0
        if self.expect:
            self.expect = False
            self.source.send_continue()
        if not self.left and not self._next_chunk():
            return 0
        view = buffer[:self.left]
        count = self.parser.take(view) or self.source.receive_into(view)
        self.left -= count
        if not self.left:
            if self.length is not None:
                self.ended = True
            elif self._line(2):
                raise refuse_head("bad-request", "malformed chunk")
        return count

    def _line(self, limit: int) -> bytes:
        line = self.parser.line(limit)
        while line is None:
            more = bytearray(RECEIVE)
            count = self.source.receive_into(memoryview(more))
            self.parser.feed(bytes(more[:count]))
            line = self.parser.line(limit)
        return line

    def _next_chunk(self) -> bool:
        """Read a chunk's first line; False at the last chunk, whose trailers are read and dropped (H12)."""
        self.left, extensions = parse_chunk_line(self._line(KiB))
        self._spend(extensions)
        if self.left:
            return True
        while True:
            line = self._line(4 * KiB)
            if not line:
                self.ended = True
                return False
            if not _TRAILER.fullmatch(line):
                raise refuse_head("bad-request", "malformed trailers")
            self._spend(line)

    def _spend(self, line: bytes) -> None:
        self.overhead += len(line)
        if self.overhead > 16 * KiB:
            raise refuse_head("bad-request", "too many chunk extensions or trailers")

    def wait_if_small(self, limit: int) -> None:
        """raises Await while a body of up to `limit` bytes is not there: then nobody has to read, or to close, for its sake"""
        if not self.ended and not self.expect and self.length is not None and len(self.parser) < self.left <= limit:
            raise Await(self.left)

    def insist(self, limit: int) -> None:
        """See that all of it is there.  raises Await while it is not, CloudError if it is, or may become, too large"""
        if self.ended:
            return
        if self.length is None:
            raise CloudError("length-required", "say how long the body is", close=True)
        if self.length > limit:
            raise CloudError("too-large", "the body may have %d bytes here" % limit, close=True)
        if len(self.parser) < self.left:
            if self.expect:
                self.source.send_continue()
            raise Await(self.left)

    def skip(self) -> bool:
        """Drop what of it is there; False if more is to come, which nobody will wait for."""
        if not self.ended and self.length is not None and len(self.parser) >= self.left and not self.expect:
            self.parser.at += self.left
            self.ended = True
        return self.ended

    def drain(self) -> bool:
        """Read what nobody asked for; False if that cannot be done in bounds, so that the connection must end."""
        if self.ended:
            return True
        if self.expect or self.length is not None and self.left > DRAIN_LIMIT:
            return False
        view, count = memoryview(bytearray(RECEIVE)), 0
        try:
            while count <= DRAIN_LIMIT and not self.ended:
                count += self.readinto(view)
        except CloudError:
            return False
        return self.ended


def read_target(target: str) -> tuple[str, tuple[str, ...], bool, str, CloudError | None]:
    """parse_target, and None; or of a target that is refused the names before the first bad one, and why.

    So that its door words the refusal, and the log names the door.
    """
    try:
        return (*parse_target(target), None)
    except CloudError as error:
        error.close = True
        names = itertools.takewhile(lambda part: re.fullmatch(r"(?!\.\.?\Z)[0-9A-Za-z_.\-]{1,64}", part), target.partition("?")[0].split("/")[1:])
        return "", tuple(names)[:4], False, "", error


# ---- the connection

class Pace:
    """At least so many bytes in each window of time, or a peer is too slow to be waited for (R34)."""

    def __init__(self, window: int) -> None:
        self.window, self.since, self.count = window, time.monotonic(), 0

    def is_slow(self) -> bool:
        """Asked now and then; looks once a window."""
        now = time.monotonic()
        if now - self.since <= self.window:
            return False
        slow = self.count < self.window * BODY_RATE
        self.since, self.count = now, 0
        return slow


HANDSHAKE, HEAD, BODY, SENDING, LINGER, CLOSED = range(6)      # what a connection waits for, while no thread has it


class Connection:
    """A socket, what came of it and what is still to go.  Nobody waits for a peer but the listener, who watches them all;
    a thread has a connection while a request is answered.

        HANDSHAKE   TLS is being set up
        HEAD        the next request, or the rest of one; silent so far if the parser is empty
        BODY        the rest of a small body, of somebody who is not let in (`wanted` bytes)
        SENDING       the peer takes an answer slowly; then HEAD, or LINGER if not `keep`
        LINGER      the answer has gone; the peer gets a moment to read it before the connection ends (H18)
    """
    __slots__ = ("sock", "peer", "parser", "phase", "until", "wanted", "out", "keep", "continued", "writes", "_patient")

    def __init__(self, sock: socket.socket, address: Any, phase: int) -> None:
        self.sock, self.phase, self.parser = sock, phase, Parser()
        peer = address[0].partition("%")[0]
        self.peer = peer[7:] if peer.startswith("::ffff:") else peer
        self.until = 0.0                         # when its phase ends, at the latest
        self.wanted, self.out, self.keep, self.continued = 0, memoryview(b""), False, False
        self.writes = False                      # in HANDSHAKE: it waits for room to send
        self._patient = False                    # the kernel ends its waits after a tick

    def wait(self, phase: int, seconds: float) -> None:
        """Give it back to the listener, for so long."""
        self.phase, self.until = phase, time.monotonic() + seconds

    def watch(self) -> None:
        """From here on no call waits."""
        self.sock.setblocking(False)

    def seize(self) -> None:
        """From here on receive and send return after a tick."""
        if self._patient:
            self.sock.setblocking(True)
        else:
            self._patient = set_patience(self.sock)

    def receive(self) -> bool | None:
        """Feed the parser with what is there; None if that is nothing, False at the end."""
        try:
            more = self.sock.recv(RECEIVE)
        except SILENT:
            return None
        except OSError:
            return False
        self.parser.feed(more)
        return bool(more)

    def flush(self) -> bool:
        """Send what the peer takes; has all gone?  raises OSError"""
        with suppress(*SILENT):
            while self.out:
                self.out = self.out[self.sock.send(self.out):]
        return not self.out

    def shake(self) -> bool:
        """Go on with the handshake; is it done?  raises OSError"""
        try:
            self.sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as missing:
            self.writes = isinstance(missing, ssl.SSLWantWriteError)
            return False
        return True

    def half_close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.wait(LINGER, LINGER_TIME)

    def is_settled(self) -> bool:
        """In HEAD or BODY: is there something to do for a thread?"""
        if self.phase == BODY:
            return len(self.parser) >= self.wanted
        mark = self.parser.at, self.parser._begun
        try:
            return self.parser.head() is not None
        except CloudError:
            return True
        finally:
            self.parser.at, self.parser._begun = mark


class Handler(BaseHTTPRequestHandler, Source):
    """A connection while a thread has it: moves bytes, and leaves what they mean to respond()."""
    server: "CloudServer"

    def setup(self) -> None:
        self.link: Connection = self.request
        self.sock, self.parser, self.peer = self.link.sock, self.link.parser, self.link.peer
        self.pace, self.hurried = Pace(BODY_WINDOW), True

    def finish(self) -> None:
        pass

    def handle(self) -> None:
        try:
            if self.link.phase == HANDSHAKE:
                if not self.link.shake():
                    return
                self.link.seize()
            while self.serve():
                pass
        except (Disconnected, OSError):
            self.link.phase = CLOSED

    def serve(self) -> bool:
        """Answer one request; False when the connection goes back to the listener, in the phase that it then has."""
        request, link = None, self.link
        try:
            head = self._next_head()
            if head is None:
                return False
            request = self._read_request(head)
            response = respond(self.server.cloud, request)
            keep = self._can_keep(request, response)
            return self._answer(request, response, keep)
        except CloudError as error:              # nothing more of this connection can be trusted
            return self._answer(NO_REQUEST, json_error(error, NO_REQUEST), False)
        except Await as more:
            self.parser.at -= len(head)
            link.wanted = len(head) + more.count
            link.wait(BODY, SMALL_BODY_TIME)
            return False
        finally:
            if request is not None and request.share is not None:
                self.server.site.shares.give(request.share)

    def _can_keep(self, request: Request, response: Response) -> bool:
        """May another request come after this answer?  Nothing is read for who was not let in (H14)."""
        body, self.link.continued = request.body, False
        return ((body.drain() if request.who.account else body.skip()) and not response.close and not self.server.stopping
                and request.minor == 1 and "close" not in request.fields.get("connection", "").lower())

    def _answer(self, request: Request, response: Response, keep: bool) -> bool:
        """Send an answer; True if the next request may come."""
        link = self.link
        try:
            sent = self._send(request, response, keep)
        except CloudError as error:              # what was sent so far is cut off
            log.error("%s %s: %s", request.method, format_path(loggable(request.path)), error)
            sent, keep, link.phase = 0, False, CLOSED
        self.server.log_access(request, response, sent)
        if link.out:
            link.keep = keep
            link.wait(SENDING, STALL_TIME + len(link.out) / BODY_RATE)
        elif not keep and link.phase != CLOSED:
            link.half_close()
        return keep and not link.out

    # ---- receiving

    def _next_head(self) -> bytes | None:
        """The next head, if it is there or comes within a tick; else None, and the listener waits for it."""
        head = self.parser.head() if len(self.parser) else None
        if head is None:
            crowded = self.server.is_crowded()
            if crowded:
                self.link.watch()                # others wait for a thread
            came = self.link.receive()
            if came is False:
                self.link.phase = CLOSED
                return None
            head = self.parser.head() if came else None
            if head is None:
                self.link.wait(HEAD, HEADER_TIME if len(self.parser) else IDLE_TIME)
            elif crowded:
                self.link.seize()
        return head

    def _read_request(self, data: bytes) -> Request:
        head = parse_head(data)
        length = parse_framing(head)
        expect = head.fields.get("expect")
        if expect is not None and (expect.lower() != "100-continue" or head.minor == 0):
            raise CloudError("expectation-failed", "only 100-continue can be expected")
        if head.target == "*" and head.method == "OPTIONS":
            authority, path, slash, query, refusal = "", (), True, "", None
        else:
            authority, path, slash, query, refusal = read_target(head.target)
        if authority:
            head.fields["host"] = authority
        site = self.server.site
        if not site.knows(head.fields.get("host", "localhost")):
            raise CloudError("misdirected", "this server does not go by that name; see --hostname")
        address, https, safe = site.locate(self.peer, self.server.tls is not None, head.fields)
        body = RequestBody(self.parser, self, length, expect is not None and not self.link.continued)
        if length != 0:
            self.pace, self.hurried = Pace(BODY_WINDOW), False
        request = Request(head.method, path, slash, query, head.fields, head.minor, body, address, https, safe, site)
        request.gone, request.refusal = partial(has_left, self.sock), refusal
        request.prefix = site.prefix(self.peer, head.fields)
        return request

    def receive_into(self, buffer: memoryview) -> int:
        if not self.hurried:
            self.hurried = True
            if QUICKACK is not None:
                self.sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)    # head and body came apart: Nagle waits for us
        while True:
            if self.pace.is_slow():
                raise refuse_head("timeout", "the body arrives too slowly")
            try:
                count = self.sock.recv_into(buffer)
            except SILENT:
                continue
            if not count:
                raise refuse_head("bad-request", "the body ended early")
            self.pace.count += count
            return count

    def send_continue(self) -> None:
        self.link.continued = True
        self.send_all(b"HTTP/1.1 100 Continue\r\n\r\n", Pace(STALL_TIME))

    # ---- sending

    def _send(self, request: Request, response: Response, keep: bool) -> int:
        """Send an answer; returns the bytes of its body.  raises CloudError if its making fails midway"""
        chunked = response.length is None and request.minor == 1
        if request.https:
            response.fields.setdefault("Strict-Transport-Security", "max-age=31536000")          # N2
        head = format_head(response, chunked, keep and (response.length is not None or chunked))
        body = response.body
        if isinstance(body, bytes):
            if request.method == "HEAD":
                body = b""
            if request.who.account:
                self.send_all(head + body, None)
            else:
                self._send_or_leave(head, body)
            return len(body)
        return self._send_parts(response, body if request.method != "HEAD" else None, head, chunked)

    def _send_or_leave(self, head: bytes, body: bytes) -> None:
        """Send what the peer takes at once; the rest waits with the listener and not with a thread."""
        self.link.watch()
        small = len(body) < RECEIVE
        self.link.out = memoryview(head + body if small else head)
        if self.link.flush() and not small:
            self.link.out = memoryview(body)
            self.link.flush()
        elif not small:
            self.link.out = memoryview(bytes(self.link.out) + body)
        if not self.link.out:
            self.link.seize()

    def _send_parts(self, response: Response, parts: Iterable[bytes | FileSlice] | None, head: bytes, chunked: bool) -> int:
        sent, pending, pace = 0, head, Pace(STALL_TIME)
        for part in parts or ():
            if isinstance(part, FileSlice) and not chunked:
                if pending:                      # TLS before Python 3.10 takes an empty send for the end
                    self.send_all(pending, pace)
                pending = b""
                sent += self._send_slice(part, pace)
                continue
            for data in (part,) if isinstance(part, bytes) else read_pieces(part):
                sent += len(data)
                self.send_all(pending + (b"%x\r\n%b\r\n" % (len(data), data) if chunked else data), pace)
                pending = b""
        if parts is not None and response.length not in (None, sent):
            raise CloudError("storage-failed", "a part of the file is missing")
        pending += b"0\r\n\r\n" if chunked and parts is not None else b""
        if pending:
            self.send_all(pending, pace)
        return sent

    def send_all(self, data: bytes, pace: Pace | None) -> None:
        """raises Disconnected when the peer takes next to nothing for a minute"""
        count = 0
        try:
            count = self.sock.send(data)
        except SILENT:
            pass
        if count < len(data):
            view, pace = memoryview(data)[count:], pace or Pace(STALL_TIME)
            while view:
                try:
                    count = self.sock.send(view)
                    view, pace.count = view[count:], pace.count + count
                except SILENT:
                    pass
                self._check_stall(pace)

    def _check_stall(self, pace: Pace) -> None:
        if pace.is_slow():
            raise Disconnected

    def _send_slice(self, part: FileSlice, pace: Pace) -> int:
        if self.server.tls or not hasattr(os, "sendfile"):
            return sum(self.send_all(data, pace) or len(data) for data in read_pieces(part))
        out, file, start, left = self.sock.fileno(), part.file.fileno(), part.start, part.count
        while left:
            self._check_stall(pace)
            try:
                count = os.sendfile(out, file, start, left)
            except SILENT:
                continue
            if not count:
                raise CloudError("storage-failed", "a part of the file is cut short")
            start, left, pace.count = start + count, left - count, pace.count + count
        return part.count


def set_patience(sock: socket.socket) -> bool:
    """Make receive and send return after a tick.  The kernel's own limits, where it has them, spare a poll() before every
    call: then True, and they stay when calls do not wait for a while."""
    sock.settimeout(TICK)
    if os.name != "nt" and not isinstance(sock, ssl.SSLSocket):
        with suppress(OSError):                  # a form unknown to us: then it polls
            for name in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, name, struct.pack(TIMEVALS.get(name, "@ll"), TICK, 0))
            sock.setblocking(True)
            return True
    return False


TIMEVALS = {66: "@qq", 67: "@qq"}       # Linux with 32-bit words and 64-bit time has options of its own; elsewhere two longs


def has_left(sock: socket.socket) -> bool:
    """Has the peer closed its side?  Looks, and takes nothing.

    A peer that goes on listening counts as gone, too, as with every proxy; so ask only while work for it is long.
    """
    if hasattr(select, "POLLRDHUP"):             # Linux; sees the end behind bytes that nobody has read yet
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        return bool(poll.poll(0))
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0)) and not socket.socket.recv(sock, 1, socket.MSG_PEEK)       # of TLS: the raw bytes


def format_head(response: Response, chunked: bool, keep: bool) -> bytes:
    """Status line and fields, to the empty line (H21, H23)."""
    lines = ["%s: %s\r\n" % item for item in response.fields.items()]
    if chunked:
        lines.append("Transfer-Encoding: chunked\r\n")
    elif response.length is not None and response.status not in (204, 304):
        lines.append("Content-Length: %d\r\n" % response.length)
    if not keep:
        lines.append("Connection: close\r\n")
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines) or "\0" in text:
        raise CloudError("internal", "a header field holds a line break")
    now = int(time.time())
    return (STATUS_LINES[response.status] + text + ALWAYS + date_line(now)).encode("latin-1")


@lru_cache(maxsize=2)
def date_line(second: int) -> str:
    return "Date: %s\r\n\r\n" % format_http_date(second * 1000)


QUICKACK = getattr(socket, "TCP_QUICKACK", None)
NO_REQUEST = Request("-", (), False, "", {}, 1, Body(), "-", False, False)


@route("OPTIONS", "/", needs="nothing")
def options(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What the server as a whole can do."""
    return Response(204, fields={"Allow": ", ".join(sorted(METHODS))})


@route("GET", "/healthz", needs="nothing")
def health(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Is the server alive, and can it write?  "ok", "low" on disk, or "read-only" (N6)."""
    state = cloud.health()
    return Response(200 if state == "ok" else 503, state.encode() + b"\n", {"Content-Type": "text/plain; charset=utf-8",
                                                                            "Cache-Control": "no-store"})


@route("GET", "/metrics", needs="nothing")
def metrics(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Numbers in Prometheus' text format, to this machine and to administrators (N6)."""
    if not who.admin and not ipaddress.ip_address(request.address).is_loopback:
        raise CloudError("forbidden", "metrics are for this machine and for administrators")
    lines = ["# TYPE cloudserver_%s gauge\ncloudserver_%s %d\n" % (name, name, value) for name, value in cloud.numbers().items()]
    return Response(200, "".join(lines).encode(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8",
                                                   "Cache-Control": "no-store"})


# ==== 9. JSON API ========================================================================
#
# /api/v1/: everything the page can do, and so can any program.  Paths are strings like "photos/a.jpg", "" is the root;
# times go out as RFC 3339 and come in so or as ms since 1970; ids and versions are decimal strings.

API = "/api/v1/"
TEXT = "string"
SEARCH_TIME = 20                # seconds a search may take
SORTS = {"name": "e.key", "size": "coalesce(c.size, e.size)", "mtime": "e.mtime", "kind": "e.kind"}


def api_node(node: Node, path: Sequence[str]) -> dict[str, Any]:
    """A node as JSON tells it."""
    about = {"path": "/".join(path), "name": node.name, "kind": "collection" if node.kind else "file", "size": node.size,
             "mtime": format_time(node.mtime), "etag": node.etag, "node": str(node.node)}
    if node.kind:
        about["files"] = node.files
    else:
        about.update(media=node.media, category=kind_of_file(node.name, node.media), version=str(node.rev))
        if node.manifest[0] != "m":
            about["sha256"] = node.manifest
    return about


def api_nodes(cloud: Cloud, rows: Iterable[tuple[Sequence[str], Node]]) -> list[dict[str, Any]]:
    """Live nodes, (path, node), with their stars."""
    rows = list(rows)
    stars = cloud.stars_among(node for _, node in rows)
    return [{**api_node(node, path), "starred": True} if node.node in stars else api_node(node, path) for path, node in rows]


def seq_of(cloud: Cloud, moment: tuple[str, int]) -> int:
    """The seq of a moment."""
    return moment[1] if moment[0] == "seq" else cloud.seq_at(moment[1])


def read_limit(value: int | None, most: int = PAGE_LIMIT) -> int:
    if value is not None and not 1 <= value <= most:
        raise CloudError("bad-request", "limit is 1 to %d" % most)
    return value or min(1000, most)


@route("GET", "/api/v1", needs="nothing")
def api_root(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What this is, its limits, and whom it takes the asker for."""
    return json_response({
        "name": "cloudserver", "set_up": cloud.accounts.is_set_up(), "account": who.name or None, "server": cloud.epoch,
        "me": api_account_of(cloud, who) if who.account else None,
        "openapi": API + "openapi.json",
        "limits": {"file": parse_size(cloud.config.max_file), "name": NAME_LIMIT, "path": PATH_LIMIT, "depth": DEPTH_LIMIT,
                   "chunk": CHUNK_LIMIT, "frames": FRAMES_LIMIT, "ops": OPS_LIMIT, "entries": PAGE_LIMIT, "copy": COPY_LIMIT}})


# ---- setting up and logging in

@route("POST", API + "setup", needs="nothing", token=TEXT, name=TEXT, password=TEXT)
def api_setup(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make the first account with the token of the setup link, and log in."""
    check_safe(request)
    values = request.values
    cloud.accounts.claim(values["token"], values["name"], values["password"], request.address)
    return api_login(cloud, who, request)


@route("POST", API + "login", needs="nothing", name=TEXT, password=TEXT)
def api_login(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Open a session; its cookie comes with the answer."""
    check_safe(request)
    values = request.values
    secret, who = cloud.accounts.log_in(values["name"], values["password"], request.address,
                                        request.fields.get("user-agent", ""))
    return json_response(api_account_of(cloud, who), 200, **{"Set-Cookie": format_cookie(request, secret, SESSION_LIFE // 1000)})


def check_safe(request: Request) -> None:
    if not request.safe:
        raise CloudError("insecure", "passwords are not accepted over plain HTTP from another machine; use HTTPS")


def format_cookie(request: Request, secret: str, seconds: int) -> str:
    """A8"""
    name, secure = ("__Host-session", "; Secure") if request.https else ("session", "")
    return "%s=%s; Path=/; Max-Age=%d; HttpOnly; SameSite=Lax%s" % (name, secret, seconds, secure)


@route("POST", API + "logout", needs="read")
def api_logout(cloud: Cloud, who: Principal, request: Request) -> Response:
    """End this session."""
    if who.means == "session":
        cloud.accounts.revoke(who, who.device)
    return Response(204, b"", {"Set-Cookie": format_cookie(request, "", 0)})


@route("POST", API + "confirm", needs="account", password=TEXT)
def api_confirm(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Give the password once more, for what needs it fresh."""
    cloud.accounts.confirm(who, request.values["password"], request.address)
    return Response(204)


@route("GET", API + "account", needs="read")
def api_account(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Who is logged in, and what they use."""
    return json_response(api_account_of(cloud, who))


def api_account_of(cloud: Cloud, who: Principal) -> dict[str, Any]:
    used, left = cloud.quota(who)
    return {"name": who.name, "admin": who.admin, "means": who.means, "readonly": who.readonly, "used": used, "left": left,
            "quota": cloud.accounts.get(who.name).quota}


@route("GET", API + "usage", needs="read")
def api_usage(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What takes how much: live files by kind, versions that were replaced, the trash; in bytes."""
    kinds, versions, trash = cloud.usage(who)
    return json_response({"kinds": [{"kind": kind, "size": size, "files": files}
                                    for kind, (size, files) in sorted(kinds.items(), key=lambda row: -row[1][0])],
                          "live": sum(size for size, _ in kinds.values()), "versions": versions, "trash": trash})


@route("POST", API + "account/password", needs="account", old=TEXT, new=TEXT)
def api_password(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Change the password; every session and app password ends."""
    cloud.accounts.check(who, request.values["old"], request.address)
    cloud.accounts.set_password(who.name, request.values["new"], who)
    return Response(204, b"", {"Set-Cookie": format_cookie(request, "", 0)})


@route("GET", API + "devices", needs="account")
def api_devices(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Sessions and app passwords."""
    return json_response({"devices": [
        {"id": device.id, "kind": device.kind, "name": device.name, "readonly": bool(device.readonly),
         "limited": device.node is not None, "created": format_time(device.created), "address": device.address,
         "used": device.used and format_time(device.used), "this": device.id == who.device}
        for device in cloud.accounts.devices(who)]})


@route("POST", API + "devices", needs="account fresh", name=TEXT, readonly_="boolean", path_="path", days_="integer")
def api_add_device(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make an app password, perhaps for reading only, for one collection, or for some days; it is shown this once."""
    values = request.values
    node = None if values["path"] is None else cloud.stat(who, values["path"])
    if node and not node.kind:
        raise CloudError("bad-request", "a device can be limited to a collection only")
    if values["days"] is not None and not 1 <= values["days"] <= 3650:
        raise CloudError("bad-request", "days is 1 to 3650")
    id, token = cloud.accounts.add_token(who, values["name"], readonly=bool(values["readonly"]), node=node and node.node,
                                         life=values["days"] and values["days"] * DAY)
    return json_response({"id": id, "token": token}, 201)


@route("DELETE", API + "devices/<id>", needs="account")
def api_revoke(cloud: Cloud, who: Principal, request: Request, id: str) -> Response:
    """End a session or app password, at once."""
    cloud.accounts.revoke(who, id)
    return Response(204)


@route("GET", API + "grants/<token>", needs="nothing")
def api_pairing(cloud: Cloud, who: Principal, request: Request, token: str) -> Response:
    """The device that waits to be let in: what it calls itself, where it asked from and when, and a code to compare.

    near  whether it asked from where this question comes from
    """
    pairing = cloud.accounts.pairing(token)
    return json_response({"device": pairing.device, "address": pairing.address, "code": pairing.code,
                          "minutes": pairing.age // MINUTE, "near": pairing.address == network_of(request.address)})


@route("POST", API + "grants/<token>", needs="account fresh")
def api_grant(cloud: Cloud, who: Principal, request: Request, token: str) -> Response:
    """Let it in: it gets an app password of its own, which can be revoked like any."""
    cloud.accounts.grant(who, token)
    return Response(204)


# ---- files

@route("GET", API + "files/<path>", needs="read", packs=True, at_="moment", sort_=TEXT, order_=TEXT, limit_="integer", after_="integer",
       chunks_="boolean", collections_first_="boolean")
def api_files(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A node and, of a collection, a page of what it holds; `at` asks for a moment of the past.

    sort  name, size, mtime or kind;  order  asc or desc, collections_first or not;  after  the `next` of the page before
    chunks  of a file also what it consists of, in order: [[sha256, bytes], ...]
    """
    values = request.values
    if values["at"] is not None:
        node, children = cloud.past(who, path, seq_of(cloud, values["at"]))
        return json_response({**api_node(node, path), "children": [api_node(child, path + (child.name,)) for child in children],
                              "next": None})
    if values["sort"] not in (None, *SORTS) or values["order"] not in (None, "asc", "desc"):
        raise CloudError("bad-request", "sort by name, size, mtime or kind; order is asc or desc")
    limit, start = read_limit(values["limit"]), max(0, values["after"] or 0)
    with cloud.listing(who, path) as listing:
        page = list(listing.page(SORTS[values["sort"] or "name"], values["order"] == "desc", start, limit + 1,
                                 collections_first=bool(values["collections_first"])))
    answer, *children = api_nodes(cloud, [(path, listing.node), *((path + (child.name,), child) for child in page[:limit])])
    if listing.node.kind:
        answer["children"], answer["next"] = children, start + limit if len(page) > limit else None
    elif values["chunks"]:
        answer["chunks"] = cloud.chunks_of(listing.node)
    return json_response(answer)


@route("PUT", API + "files/<path>", needs="write", mtime_="time", parents_="boolean", keep_="boolean")
def api_write(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Store the body as a file; keep: beside what is there, under a free name."""
    values = request.values
    given = replace(read_conditions(request), beside=True) if values["keep"] else read_conditions(request)
    node, new = cloud.write(who, path, request.body, given, parents=bool(values["parents"]),
                            mtime=values["mtime"])
    return json_response(api_node(node, path[:-1] + (node.name,)), 201 if new else 200, ETag='"%s"' % node.etag)


@route("PATCH", API + "files/<path>", needs="write", mtime="time")
def api_patch(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Set the time of a file or collection."""
    return json_response(api_node(cloud.patch(who, path, read_conditions(request), mtime=request.values["mtime"]), path))


@route("GET", API + "content/<path>", needs="read", at_="moment", version_="id")
def api_content(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """The bytes of a file: as it is, as it was at a time, or in a version."""
    values = request.values
    if values["version"] is not None:
        return content_response(request, *cloud.version(who, path, values["version"]))
    if values["at"] is not None:
        return content_response(request, *cloud.past_content(who, path, seq_of(cloud, values["at"])))
    node, content = cloud.open(who, path)
    if content is None:
        raise CloudError("conflict", "this is a collection; ask for it as /api/v1/zip/")
    return content_response(request, node, content)


@route("POST", API + "make-collection", needs="write", path="path", parents_="boolean")
def api_make_collection(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make a collection."""
    path = request.values["path"]
    return json_response(api_node(cloud.make_collection(who, path, parents=bool(request.values["parents"])), path), 201)


@route("POST", API + "move", needs="write", items="transfers", clash_=TEXT)
def api_move(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Move and rename, many in one step.

    items  [{"from": path, "to": path}], each perhaps with its own "clash"
    clash  what to do if a place is taken: refuse, replace, keep (both)
    """
    return api_transfer(cloud, who, cloud.move, request.values)


@route("POST", API + "copy", needs="write", items="transfers", clash_=TEXT)
def api_copy(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Copy, many in one step; as move."""
    return api_transfer(cloud, who, partial(cloud.copy, alive=request.check_alive), request.values)


def api_transfer(cloud: Cloud, who: Principal, verb: Callable[..., list[tuple[Node, bool]]], values: dict[str, Any]) -> Response:
    clash = read_clash(values["clash"] or "refuse")
    pairs = [(source, target) for source, target, _ in values["items"]]
    if not pairs:
        raise CloudError("bad-request", "items are 1 to %d" % PAGE_LIMIT)
    arrived = verb(who, *pairs, clash=[own or clash for _, _, own in values["items"]])
    return json_response({"seq": arrived[0][0].since, "items": [
        api_node(node, target[:-1] + (node.name,)) for (node, _), (_, target) in zip(arrived, pairs)]})


@route("POST", API + "taken", needs="read", paths="paths")
def api_taken(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Those of some paths at which there is something, so that moving there needs a decision."""
    return json_response({"taken": list(map("/".join, cloud.taken(who, *request.values["paths"])))})


@route("POST", API + "delete", needs="write", paths="paths")
def api_delete(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Move to the trash, many in one step; returns the seq to undo."""
    return json_response({"seq": cloud.delete(who, *request.values["paths"])})


@route("POST", API + "zip-names", needs="read", names="paths")
def api_name_members(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Name the members of an archive that are too many for an address; the id that is returned is its `names`, for an hour."""
    names = list(map("/".join, request.values["names"]))
    return json_response({"id": cloud.keep(who, names)}, 201)


@route("GET", API + "zip/<path>", needs="read", name_="paths", names_=TEXT, at_="moment")
def api_zip(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A collection, or those of its members that are named, one by one or by the id of a list, as a zip archive."""
    values = request.values
    moment = None if values["at"] is None else seq_of(cloud, values["at"])
    names = values["name"] or () if values["names"] is None else list(map(split_path, cloud.kept(who, values["names"])))
    return zip_response(cloud, who, path, names, moment)


def zip_response(cloud: Cloud, who: Principal, path: tuple[str, ...], names: Sequence[tuple[str, ...]], moment: int | None) -> Response:
    """All below a path, or only some members, as of now or of a seq."""
    where = path + names[0] if len(names) == 1 else path
    stem = where[-1] if where else "files"
    archive = zip_archive(cloud.archive(who, path, names, moment), stem)
    return Response(200, archive, {"Content-Type": "application/zip", "Cache-Control": PRIVATE,
                                   "Content-Disposition": format_disposition(stem + ".zip"), "Content-Security-Policy": SANDBOX})


class _Sink(io.RawIOBase):
    """Where zipfile writes to; what it wrote is taken away piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self.pieces = b"".join(self.pieces), []
        return data


def zip_archive(contents: Iterator[tuple[tuple[str, ...], Node, Content | None]], top: str) -> Iterator[bytes]:
    """A zip archive made while it is sent, not compressed; names are relative and unique (Z1)."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path, node, content in contents:
            moment = _EPOCH + timedelta(milliseconds=max(node.mtime, 315_532_800_000))       # not before 1980
            info = zipfile.ZipInfo("/".join(path or (top,)) + "/" * node.kind, moment.timetuple()[:6] if moment.year < 2108
                                   else (2107, 12, 31, 23, 59, 58))
            info.external_attr = (0o40755 << 16 | 0x10) if node.kind else 0o100644 << 16
            if content is None:
                archive.writestr(info, b"")
            else:
                info.file_size = node.size
                with archive.open(info, "w", force_zip64=node.size >= GiB) as member:
                    for part in content.slices():
                        for piece in (part,) if isinstance(part, bytes) else read_pieces(part):
                            member.write(piece)
                            yield sink.take()
            yield sink.take()
    yield sink.take()


# ---- what was

@route("GET", API + "versions/<path>", needs="read", packs=True)
def api_versions(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """The versions of a file, the newest first; the first is what it is now."""
    return json_response({"versions": [
        {"version": str(v.rev), "at": format_time(v.at), "size": v.size, "mtime": format_time(v.mtime), "account": v.account,
         "device": v.device, "name": v.name, **({"sha256": v.manifest} if v.manifest[0] != "m" else {})}
        for v in cloud.versions(who, path)]})


@route("POST", API + "versions/restore", needs="write", path="path", version="id")
def api_restore_version(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make an old version the present one; returns the file, and the seq to undo."""
    path = request.values["path"]
    node = cloud.restore_version(who, path, request.values["version"])
    return json_response({**api_node(node, path), "seq": node.since})


@route("POST", API + "versions/pin", needs="write", path="path", version="id", name_=TEXT)
def api_pin(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Keep a version for good under a name; without a name, let go of it."""
    cloud.pin(who, request.values["path"], request.values["version"], request.values["name"])
    return Response(204)


@route("GET", API + "trash", needs="read", packs=True, before_="integer", limit_="integer")
def api_trash(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What was deleted, the latest first; go on with before=next."""
    limit = read_limit(request.values["limit"])
    items = cloud.trash(who, request.values["before"] or 1 << 62, limit)
    return json_response({"items": [{**api_node(item.node, item.path), "deleted": format_time(item.at), "by": item.account}
                                    for item in items], "next": items[-1].node.until if len(items) == limit else None})


@route("POST", API + "trash/restore", needs="write", nodes="ids")
def api_restore(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Bring deleted nodes back to where they were."""
    seq, places = cloud.restore(who, *request.values["nodes"])
    return json_response({"seq": seq, "paths": ["/".join(path) for path in places]})


@route("POST", API + "trash/empty", needs="write", nodes_="ids")
def api_empty_trash(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Give up deleted nodes for good: those named, or all."""
    nodes = request.values["nodes"]
    return json_response({"removed": 0 if nodes == [] else cloud.empty_trash(who, *nodes or ())})


@route("POST", API + "undo", needs="write", seq="integer")
def api_undo(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Take back one step of the journal; `skipped` counts what changed since and was left alone."""
    seq, skipped = cloud.undo(who, request.values["seq"])
    return json_response({"seq": seq, "skipped": skipped})


@route("POST", API + "rewind", needs="write", path="path", at="moment", dry_="boolean")
def api_rewind(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make a collection what it was at a time; dry only counts."""
    seq, changed = cloud.rewind(who, request.values["path"], seq_of(cloud, request.values["at"]),
                                dry=bool(request.values["dry"]))
    return json_response({"seq": seq, "changed": changed})


@route("POST", API + "bring-back", needs="write", at="moment", paths="paths")
def api_bring_back(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make what was at paths at a time what it was, with all that it held; the rest stays.  changed: 0 if it is so already."""
    seq, changed = cloud.bring_back(who, seq_of(cloud, request.values["at"]), *request.values["paths"])
    return json_response({"seq": seq, "changed": changed})


@route("GET", API + "differences/<path>", needs="read", packs=True, at="moment", limit_="integer")
def api_differences(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """What was added, deleted, changed or moved below a collection since a time, in the order of paths."""
    found = cloud.differences(who, path, seq_of(cloud, request.values["at"]), request.check_alive)
    return json_response({"count": len(found), "changes": [
        {"how": one.how, "kind": "collection" if (one.now or one.then).kind else "file", "size": (one.now or one.then).size,
         "path": one.path and "/".join(path + one.path), "was": one.was and "/".join(path + one.was)}
        for one in found[:read_limit(request.values["limit"])]]})


@route("GET", API + "held", needs="account")
def api_held(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Devices that are held because they delete or overwrite too much."""
    return json_response({"held": [{"device": brake.device, "name": name, "deletes": brake.deletes, "overwrites": brake.overwrites,
                                    "since": format_time(brake.held)} for brake, name in cloud.held(who)]})


@route("POST", API + "allow", needs="account", device=TEXT)
def api_allow(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Let a held device go on."""
    cloud.allow(who, request.values["device"])
    return Response(204)


@route("POST", API + "undo-device", needs="account", device=TEXT)
def api_undo_device(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Take back what a held device did, in one step that can be undone itself."""
    seq, changed = cloud.undo_device(who, request.values["device"])
    return json_response({"seq": seq, "changed": changed})


@route("GET", API + "activity", needs="read", packs=True, before_="integer", limit_="integer", action_=TEXT, device_=TEXT, after_="time",
       until_="time", grouped_="boolean")
def api_activity(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The journal of the account, the latest first; go on with before = seq of the last.

    action, device   only these;  after, until  only between these times
    grouped          many steps of one act are told as one: `seqs` names them all, the latest first, detail.count what they touched
    """
    values, limit = request.values, read_limit(request.values["limit"])
    steps = cloud.activity(
        who, values["before"] or 1 << 62, PAGE_LIMIT // 2 if values["grouped"] else limit, action=values["action"],
        device=values["device"], after=values["after"] or 0, until=1 << 62 if values["until"] is None else values["until"])
    return json_response({"steps": list(map(api_act, group_steps(steps)[:limit])) if values["grouped"] else list(map(api_step, steps))})


def api_step(step: Step) -> dict[str, Any]:
    return {"seq": step.seq, "at": format_time(step.at), "action": step.action, "detail": step.detail, "account": step.account,
            "device": step.device, "undoable": step.undoable}


def api_act(steps: list[Step]) -> dict[str, Any]:
    """Steps that were told together; of one alone it is what api_step says."""
    if len(steps) == 1:
        return api_step(steps[0])
    return {**api_step(steps[0]), "undoable": all(step.undoable for step in steps), "seqs": [step.seq for step in steps],
            "detail": {**steps[0].detail, "count": sum(step.detail.get("count", 1) for step in steps)}}


def group_steps(steps: Iterable[Step]) -> list[list[Step]]:
    """Neighbours that did the same in the same collection with the same device, with no long pause between them."""
    def act(step: Step) -> tuple[Any, ...]:
        places = [str(step.detail.get(name, "")).rpartition("/")[0] for name in ("path", "to")]          # a rewind's "to" is a seq
        return step.action, step.account, step.device, step.detail.get("new"), *places, "path" in step.detail or step.seq

    groups: list[list[Step]] = []
    for step in steps:
        if groups and act(groups[-1][-1]) == act(step) and groups[-1][-1].at - step.at < 10 * MINUTE:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


@route("GET", API + "activity/server", needs="admin", before_="integer", limit_="integer")
def api_server_activity(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What happened to accounts and settings of the whole server, the latest first."""
    values = request.values
    return json_response({"steps": list(map(api_step, cloud.server_activity(values["before"] or 1 << 62, read_limit(values["limit"]))))})


@route("GET", API + "activity/devices", needs="account")
def api_activity_devices(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The devices of the account by the names that steps bear."""
    names = {device.name: device.kind for device in cloud.accounts.devices(who)}
    return json_response({"devices": [{"name": name, "kind": kind} for name, kind in sorted(names.items())]})


@route("GET", API + "search", needs="read", q_=TEXT, path_="path", within_=TEXT, kind_=TEXT, larger_="integer", smaller_="integer",
       after_="time", before_="time", limit_="integer")
def api_search(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Files and collections by words of their names and, of text files, contents; the latest changed first.

    q        words that must be there; "several in quotes" hang together, a leading - asks for what does not have it
    path     only what is below;  within  names or contents, not both
    kind     image, video, audio, pdf, table, document, archive, text or collection
    larger, smaller   bytes, inclusive;  after, before   times of modification
    """
    values = request.values
    words, without = parse_words(values["q"] or "")
    query = Query(words, without, values["within"] or "", values["kind"] or "", values["larger"], values["smaller"],
                  values["after"], values["before"])
    if query.within not in ("", "names", "contents") or query.kind not in ("", "collection", *KINDS):
        raise CloudError("bad-request", "within is names or contents; kind is collection, %s" % ", ".join(KINDS))
    if query == Query(within=query.within):
        return json_response({"items": [], "more": False})
    found, more = cloud.search(who, query, values["path"] or (), read_limit(values["limit"], 1000),
                               partial(request.check_alive, SEARCH_TIME))
    items = api_nodes(cloud, ((hit.path, hit.node) for hit in found))
    for item, hit in zip(items, found):
        if hit.snippet:
            item["snippet"] = dict(zip(("before", "match", "after"), hit.snippet))
    return json_response({"items": items, "more": more})


@route("GET", API + "thumbnails/<path>", needs="read", version_="id")
def api_thumbnail(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A small picture of a file or of one of its versions; 204 if nobody made one yet."""
    version = request.values["version"]
    answer = api_thumbnail_response(request, cloud.thumbnail(who, path, version))
    if version is not None and answer.status == 200:
        answer.fields["Cache-Control"] = "private, max-age=31536000, immutable"
    return answer


def api_thumbnail_response(request: Request, data: bytes | None) -> Response:
    if data is None:
        return Response(204, b"", {"Cache-Control": "no-store"})
    return kept_response(request, data, {"Content-Type": media_of_picture(data), "Cache-Control": PRIVATE,
                                         "Content-Security-Policy": SANDBOX, "Cross-Origin-Resource-Policy": "same-origin"})


@route("PUT", API + "thumbnails/<path>", needs="write", version_="id")
def api_put_thumbnail(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Keep a small picture (WebP, JPEG or PNG, at most 64 KiB) for all who see this content in the account."""
    version, data = request.values["version"], request.body.read(THUMBNAIL_LIMIT + 1)
    if len(data) > THUMBNAIL_LIMIT:
        raise CloudError("too-large", "a thumbnail has at most %s" % format_size(THUMBNAIL_LIMIT))
    cloud.put_thumbnail(who, path, data, version)
    return Response(204)


@route("POST", API + "star", needs="write", paths="paths", starred="boolean")
def api_star(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Mark files and collections with a star, or take it away, many in one step."""
    paths = request.values["paths"]
    if not paths:
        raise CloudError("bad-request", "paths are 1 to %d" % PAGE_LIMIT)
    cloud.star(who, *paths, on=request.values["starred"])
    return Response(204)


@route("GET", API + "starred", needs="read", packs=True)
def api_starred(cloud: Cloud, who: Principal, request: Request) -> Response:
    """All that bears a star, in the order of paths."""
    return json_response({"items": api_nodes(cloud, cloud.starred(who))})


@route("POST", API + "qr", needs="read", text=TEXT)
def api_qr(cloud: Cloud, who: Principal, request: Request) -> Response:
    """A text as a QR code: rows of 1 (dark) and 0; it stands in no address, for it may be a secret."""
    return json_response({"rows": ["".join("01"[dark] for dark in row) for row in qr_code(request.values["text"])]})


# ---- for administrators

def api_account_row(account: Account) -> dict[str, Any]:
    return {"name": account.name, "admin": bool(account.admin), "quota": account.quota, "used": account.used,
            "files": account.files, "created": format_time(account.created)}


@route("GET", API + "accounts", needs="admin")
def api_accounts(cloud: Cloud, who: Principal, request: Request) -> Response:
    """All accounts."""
    return json_response({"accounts": list(map(api_account_row, cloud.accounts.list()))})


@route("POST", API + "accounts", needs="admin fresh", name=TEXT, password=TEXT, admin_="boolean", quota_="integer")
def api_add_account(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Make an account; quota in bytes."""
    values = request.values
    cloud.accounts.add(values["name"], values["password"], admin=bool(values["admin"]), who=who,
                       quota=cloud.policy().quota if values["quota"] is None else values["quota"])
    return json_response(api_account_row(cloud.accounts.get(values["name"])), 201)


@route("PATCH", API + "accounts/<name>", needs="admin fresh", admin_="boolean", quota_="integer", password_=TEXT)
def api_change_account(cloud: Cloud, who: Principal, request: Request, name: str) -> Response:
    """Change rights, quota (negative is none) or password; the own one only by account/password, which wants the old one."""
    values = request.values
    if values["password"] is not None:
        if account_key(name) == account_key(who.name):
            raise CloudError("forbidden", "change your own password at account/password")
        cloud.accounts.set_password(name, values["password"], who)
    quota = False if values["quota"] is None else None if values["quota"] < 0 else values["quota"]
    return json_response(api_account_row(cloud.accounts.update(name, who, admin=values["admin"], quota=quota)))


@route("DELETE", API + "accounts/<name>", needs="admin fresh")
def api_remove_account(cloud: Cloud, who: Principal, request: Request, name: str) -> Response:
    """End an account; its files go after the days that history is kept."""
    cloud.accounts.remove(name, who)
    return Response(204)


@route("GET", API + "settings", needs="admin")
def api_settings(cloud: Cloud, who: Principal, request: Request) -> Response:
    """How long history is kept (days), the most it may take, and the quota of new accounts (bytes; null is none)."""
    return json_response(cloud.policy()._asdict())


@route("PATCH", API + "settings", needs="admin fresh", keep_days_="integer", history_="integer", quota_="integer")
def api_change_settings(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Change some of them; from then on they count instead of the command line.  Negative bytes are no limit."""
    values = {name: value if name == "keep_days" or value >= 0 else None for name, value in request.values.items() if value is not None}
    return json_response(cloud.set_policy(who, **values)._asdict())


@route("GET", API + "status", needs="admin")
def api_status(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Version, health and numbers of the server."""
    return json_response({"version": __version__, "python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version,
                          "health": cloud.health(), **cloud.numbers()})


# ---- OpenAPI, from the table of routes

@route("GET", API + "openapi.json", needs="nothing", packs=True)
def api_openapi(cloud: Cloud, who: Principal, request: Request) -> Response:
    """This description."""
    return kept_response(request, openapi_document(), {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-cache"})


@lru_cache(maxsize=1)
def openapi_document() -> bytes:
    paths: dict[str, Any] = {}
    for found in walk_routes(ROUTES):
        if found.pattern.startswith(("/api/", "/tus", "/healthz")):
            paths.setdefault(found.pattern.replace("<", "{").replace(">", "}"), {})[found.method.lower()] = describe_route(found)
    return format_json({
        "openapi": "3.1.0", "info": {"title": "cloudserver", "version": __version__}, "paths": paths,
        "components": {"securitySchemes": {"basic": {"type": "http", "scheme": "basic"},
                                           "token": {"type": "http", "scheme": "bearer"}},
                       "schemas": {"Problem": {"type": "object", "properties": {
                           "title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"},
                           "code": {"type": "string", "enum": sorted(ERRORS)}}}}}})


def walk_routes(place: dict[str, Any]) -> Iterator[Route]:
    for part, below in place.items():
        yield from below.values() if part in ("", "<>", "<path>") else walk_routes(below)


def describe_route(found: Route) -> dict[str, Any]:
    """An operation object of OpenAPI."""
    text = (found.handler.__doc__ or "").strip()
    values = {name.rstrip("_"): VALUES[kind][1] for name, kind in found.values.items()}
    required = [name for name in found.values if name[-1] != "_"]
    about: dict[str, Any] = {"summary": text.partition("\n")[0], "description": inspect.cleandoc(text), "parameters": [],
                             "responses": {"default": {"description": "done, or a problem", "content": {
                                 "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}},
                             "security": [{"basic": []}, {"token": []}] if found.needs != "nothing" else []}
    if found.tail:
        about["parameters"].append({"name": found.tail, "in": "path", "required": True, "schema": {"type": "string"}})
    if found.method in IN_QUERY:
        about["parameters"] += [{"name": name, "in": "query", "required": name in required, "schema": schema}
                                for name, schema in values.items()]
    elif values:
        about["requestBody"] = {"content": {"application/json": {"schema": {
            "type": "object", "properties": values, "required": required, "additionalProperties": False}}}}
    return about


# ==== 10. Transfer =======================================================================
#
# Resumable uploads by the tus protocol, 1.0: core, creation, creation-with-upload, creation-defer-length, checksum,
# expiration, termination.  An upload is finished when its last byte has come; there is nothing to assemble.

TUS_VERSION, TUS_EXTENSIONS = "1.0.0", "creation,creation-with-upload,creation-defer-length,checksum,expiration,termination"
TUS_CHECKSUMS = {"sha1": "sha1", "sha256": "sha256", "md5": "md5"}


def tus_response(status: int, upload: Upload | None = None, now: int = 0, wall: int = 0, **fields: str) -> Response:
    answer = {"Tus-Resumable": TUS_VERSION, "Cache-Control": "no-store", **{name.replace("_", "-"): value
                                                                          for name, value in fields.items()}}
    if upload:
        answer["Upload-Offset"] = str(upload.received)
        if upload.done is None:
            answer["Upload-Expires"] = format_http_date(wall + upload.due - now)
    return Response(status, b"", answer)


def tus_error(error: CloudError, request: Request) -> Response:
    """A problem document, with what tus clients look for."""
    response = json_error(error, request)
    response.fields["Tus-Resumable"] = TUS_VERSION
    if error.status == 412 and error.detail.get("version"):
        response.fields["Tus-Version"] = TUS_VERSION
    return response


def check_tus(request: Request) -> None:
    if request["tus-resumable"] != TUS_VERSION:
        raise CloudError("precondition-failed", "this server speaks tus " + TUS_VERSION, version=True)


def read_number(request: Request, name: str) -> int | None:
    text = request[name]
    if text is None:
        return None
    if not _LENGTH.fullmatch(text):
        raise CloudError("bad-request", "malformed " + name)
    return int(text)


def read_tus_checksum(request: Request) -> tuple[str, bytes] | None:
    text = request["upload-checksum"]
    if text is None:
        return None
    name, _, value = text.partition(" ")
    if name not in TUS_CHECKSUMS or not re.fullmatch(r"[A-Za-z0-9+/]+=*", value):
        raise CloudError("bad-request", "unknown or malformed Upload-Checksum")
    return TUS_CHECKSUMS[name], base64.b64decode(value + "==")


@route("OPTIONS", "/tus", needs="nothing", refuse=tus_error)
def tus_options(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What of tus is understood."""
    return tus_response(204, Tus_Version=TUS_VERSION, Tus_Extension=TUS_EXTENSIONS,
                        Tus_Max_Size=str(parse_size(cloud.config.max_file)), Tus_Checksum_Algorithm=",".join(TUS_CHECKSUMS))


@route("POST", "/tus", needs="write", refuse=tus_error)
def tus_create(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Announce an upload.

    Upload-Metadata names the place as `path`, or as `filename` for a file in the root; `mtime` sets its time, `parents`
    makes missing collections, `clash` is replace (the default), refuse, or keep: then it gets a free name beside what is there.
    """
    check_tus(request)
    size, text = read_number(request, "upload-length"), request.fields.get("upload-metadata", "")
    if (size is None) == (request["upload-defer-length"] is None) or request["upload-defer-length"] not in (None, "1"):
        raise CloudError("bad-request", "Upload-Length or Upload-Defer-Length: 1 is needed")
    about = parse_metadata(text)
    path = split_path(about.get("path") or about.get("filename") or "")
    if not path or len(text) > 8 * KiB:
        raise CloudError("bad-request", "Upload-Metadata must hold a path or a filename")
    given = replace(read_conditions(request), beside=about.get("clash") == "keep")
    if about.get("clash") == "refuse":
        given = replace(given, if_none_match=("*",))
    upload = cloud.create_upload(who, path, size, given, parents="parents" in about, note=text,
                                 mtime=parse_time(about["mtime"]) if "mtime" in about else None)
    if request["content-type"] == "application/offset+octet-stream" and not upload.done:
        upload = cloud.append(who, upload.id, 0, request.body, checksum=read_tus_checksum(request))
    return tus_response(201, upload, cloud.clock.due(), cloud.clock.wall(), Location=request.href(("tus", upload.id)))


@route("HEAD", "/tus/<id>", needs="write", refuse=tus_error)
def tus_head(cloud: Cloud, who: Principal, request: Request, id: str) -> Response:
    """Where an upload stands."""
    check_tus(request)
    upload = cloud.upload(who, id)
    fields = {"Upload_Length": str(upload.size)} if upload.size is not None else {"Upload_Defer_Length": "1"}
    if upload.note:
        fields["Upload_Metadata"] = upload.note
    return tus_response(200, upload, cloud.clock.due(), cloud.clock.wall(), **fields)


@route("PATCH", "/tus/<id>", needs="write", refuse=tus_error)
def tus_patch(cloud: Cloud, who: Principal, request: Request, id: str) -> Response:
    """The next part of an upload."""
    check_tus(request)
    if request["content-type"] != "application/offset+octet-stream":
        raise CloudError("unsupported-media", "a part is application/offset+octet-stream")
    offset = read_number(request, "upload-offset")
    if offset is None:
        raise CloudError("bad-request", "Upload-Offset is missing")
    upload = cloud.append(who, id, offset, request.body, size=read_number(request, "upload-length"),
                          checksum=read_tus_checksum(request))
    return tus_response(204, upload, cloud.clock.due(), cloud.clock.wall())


@route("DELETE", "/tus/<id>", needs="write", refuse=tus_error)
def tus_delete(cloud: Cloud, who: Principal, request: Request, id: str) -> Response:
    """Give an upload up."""
    check_tus(request)
    cloud.drop_upload(who, id)
    return tus_response(204)


TUS_METHODS = {"HEAD": tus_head, "PATCH": tus_patch, "DELETE": tus_delete}


@route("POST", "/tus/<id>", needs="write", refuse=tus_error)
def tus_override(cloud: Cloud, who: Principal, request: Request, id: str) -> Response:
    """Any of these, as X-HTTP-Method-Override names it, for who can send nothing but POST (tus 1.0)."""
    method = request.fields.get("x-http-method-override", "")
    if method not in TUS_METHODS:
        raise CloudError("method-not-allowed", "X-HTTP-Method-Override is HEAD, PATCH or DELETE", allow="DELETE, HEAD, OPTIONS, PATCH")
    return TUS_METHODS[method](cloud, who, request, id)


# ---- native sync: many small files in one request, and of a large one only what the other side lacks

LINE_OF_OPS = 4 * MiB           # bytes of the first line of a commit
WAIT_LIMIT = 60                 # seconds that a question may wait for its answer
EVENTS_LIFE = 10 * 60           # seconds after which a listener has to ask again


def sync_place(place: Place) -> dict[str, Any]:
    """A node as sync tells it; times are ms since 1970."""
    node = place.node
    about = {"path": "/".join(place.path), "node": str(node.node), "kind": "collection" if node.kind else "file",
             "mtime": node.mtime, "etag": node.etag}
    if not node.kind:
        about.update(size=node.size, sha256=place.sha256)
        if place.chunks is not None:
            about["chunks"] = place.chunks
    return about


@route("GET", API + "manifest", needs="read", path_="path", at_="moment", chunks_="boolean", since_="integer", tag_=TEXT)
def sync_manifest(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Everything below a path, one JSON object a line, in the order of paths; the last line is {"end": true, "count": N}.

    The first line is {"seq", "tag", "server", "node"}: ask for the changes since that seq.  `chunks` adds [[hash, size], ...].
    With the `since` and `tag` a client has, 409 other-history says that an older state was put back: what is missing then is
    not deleted.
    """
    values = request.values
    cloud.check_history(None, values["since"], values["tag"])
    path = values["path"] or ()
    seq, top, places = cloud.manifest(who, path, None if values["at"] is None else seq_of(cloud, values["at"]),
                                      bool(values["chunks"]))
    first = {"seq": seq, "tag": cloud.tag_at(seq), "server": cloud.epoch, "node": str(top.node)}
    return Response(200, sync_lines(first, places), {"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}, length=None)


def sync_lines(first: dict[str, Any], places: Iterator[Place]) -> Iterator[bytes]:
    count, lines = 0, [format_json(first)]
    for place in places:
        count += 1
        lines.append(format_json(sync_place(place)))
        if len(lines) >= PIECE:
            yield b"\n".join(lines) + b"\n"
            lines = []
    yield b"\n".join([*lines, format_json({"end": True, "count": count})]) + b"\n"


@route("GET", API + "changes", needs="read", since="integer", wait_="integer", limit_="integer", chunks_="boolean", server_=TEXT,
       tag_=TEXT)
def sync_changes(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The newest state of every node touched since a seq, each once; `wait` holds the answer, seconds, until there is one.

    One that is out of sight has "path": null and says what became of it: deleted or moved.  `was` is its path as of
    `since`, `root` the node whose changes these are.  410 asks to read the manifest anew; 409 other-history says that `since`
    and its `tag` are of another past: an older state was put back, and what is missing is not deleted.
    """
    values = request.values
    cloud.check_history(values["server"], values["since"], values["tag"])
    since, wait = values["since"], min(max(0, values["wait"] or 0), WAIT_LIMIT)
    if wait and cloud.newest(who) <= since <= cloud.head():
        cloud.await_change(who, since, wait, request.check_alive)
    reached, changes = cloud.changes(who, (), since, read_limit(values["limit"]), request.check_alive)
    found = []
    for change in changes:
        about = {"path": None, "node": str(change.id), "kind": "collection" if change.kind else "file",
                 "gone": "moved" if change.node else "deleted"}
        if change.path is not None:
            about = sync_place(cloud.place_of(change.node, change.path, bool(values["chunks"])))
        found.append({**about, "was": None if change.was is None else "/".join(change.was)})
    return json_response({"seq": reached, "tag": cloud.tag_at(reached), "more": reached < cloud.head(), "root": str(who.root),
                          "changes": found})


@route("GET", API + "events", needs="read")
def sync_events(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Server-sent events: {"seq": N} whenever something in the account has changed."""
    cloud.await_change(who, cloud.newest(who), 0)        # refuse now what would be refused later
    return Response(200, sync_wake_ups(cloud, who), {"Content-Type": "text/event-stream", "Cache-Control": "no-store",
                                                     "X-Accel-Buffering": "no"}, length=None)


def sync_wake_ups(cloud: Cloud, who: Principal) -> Iterator[bytes]:
    seq, until = cloud.newest(who), time.monotonic() + EVENTS_LIFE
    yield b'retry: 2000\ndata: {"seq":%d}\n\n' % seq
    while time.monotonic() < until and not cloud.closing.is_set():
        if cloud.await_change(who, seq, 15):
            seq = cloud.newest(who)
            yield b'data: {"seq":%d}\n\n' % seq
        else:
            yield b":\n\n"                               # finds out whether anybody still listens


@route("POST", API + "chunks/missing", needs="read", hashes="hashes")
def sync_missing(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Which of these chunks would have to be sent?  Those of other accounts count as missing."""
    return json_response({"missing": cloud.missing(who, request.values["hashes"])})


@route("POST", API + "chunks", needs="write")
def sync_send(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Store chunks ahead of the commit that will name them: frames of length (4 bytes, big endian) and bytes."""
    return json_response({"stored": cloud.send(who, FrameReader(request.body))})


@route("POST", API + "chunks/get", needs="read", hashes="hashes")
def sync_get(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The frames of these chunks, in this order."""
    hashes = request.values["hashes"]
    size, parts = cloud.read_chunks(who, hashes)
    return Response(200, parts, {"Content-Type": "application/octet-stream", "Cache-Control": "no-store"},
                    length=size + 4 * len(hashes))


@route("POST", API + "commit", needs="write")
def sync_commit(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Many steps in one request, one transaction, one answer; then, in the same body, frames of the chunks they name.

    The first line is {"op": id, "ops": [...], "atomic"?, "since"?, "tag"?, "server"?}.  Steps:
    {"put": path, "chunks": [[hash, size], ...], "mtime": ms, "if"?: etag or null}, {"mkdir": path},
    {"move": path, "to": path, "if"?: etag}, {"delete": path, "if"?: etag, "since"?: seq}; "if": null says that nothing is there,
    "since" that no other device changed anything since.  Each gets {"status", "etag", "node"} or a problem, in order.
    The same `op` again changes nothing and is answered the same.  "cursor" and its "tag" come when no other device did anything
    after `since`.  409 other-history, and nothing done, if `since` and `tag` are of another past.
    """
    reader = FrameReader(request.body)
    line = reader.line(LINE_OF_OPS)
    values = check_fields(parse_json(line), COMMIT_FIELDS)
    op, steps, since = values["op"], list(map(sync_step, values["ops"])), values.get("since")
    if not 0 < len(op) <= 64 or not 0 < len(steps) <= OPS_LIMIT:
        raise CloudError("bad-request", 'the first line is {"op": id, "ops": [1 to %d steps]}' % OPS_LIMIT)
    cloud.check_history(values.get("server"), since, values.get("tag"))
    seq, results, alone = cloud.commit(who, op, hashlib.sha256(line).hexdigest(), steps, reader,
                                       atomic=values.get("atomic") is True, since=since)
    return json_response({"seq": seq, "results": results, **({"cursor": seq, "tag": cloud.tag_at(seq)} if alone else {})})


COMMIT_FIELDS = {"op": TEXT, "ops": "array", "atomic_": "boolean", "since_": "integer", "tag_": TEXT, "server_": TEXT}
STEP_FIELDS = {  # of each kind of step; paths are looked at step by step, so that one is refused alone
    "put": {"put": TEXT, "chunks": "chunks", "mtime": "time", "if_": "etag"}, "mkdir": {"mkdir": TEXT},
    "move": {"move": TEXT, "to": TEXT, "if_": "etag"}, "delete": {"delete": TEXT, "if_": "etag", "since_": "integer"}}


def sync_step(step: Any) -> dict[str, Any]:
    """A step of a commit, its shape checked.  raises CloudError"""
    verbs = [verb for verb in STEP_FIELDS if isinstance(step, dict) and verb in step]
    if len(verbs) != 1:
        raise CloudError("bad-request", "a step is a put, mkdir, move or delete")
    return check_fields(step, STEP_FIELDS[verbs[0]])


# ==== 11. WebDAV =========================================================================
#
# RFC 4918 classes 1, 2 and 3, with quotas (RFC 4331), extended MKCOL (RFC 5689) and sync-collection (RFC 6578).
# A quirk of a client is a row or a few lines here, with the client named; the operations never learn of it.

DAV = "/dav/<path>"
CLASSES = "1, 2, 3, extended-mkcol"
XML_TYPE = "application/xml; charset=utf-8"      # exactly so: ownCloud's client refuses any other spelling
LOCK_DEFAULT = 3600                              # seconds, when a client names no Timeout
ROOT_NAMESPACES = {"xmlns_" + prefix: namespace for namespace, prefix in NAMESPACES.items()}


class Door(NamedTuple):
    """Addresses under which the files of an account are reached, and what is told of them there."""
    names: tuple[str, ...]               # what they begin with
    owned: bool                          # the name of the account follows
    properties: dict[str, Callable[[Node, "About"], Optional[str]]]


DOORS: list[Door] = []                   # the first whose names fit


def find_door(address: tuple[str, ...]) -> tuple[Door, tuple[str, ...], tuple[str, ...]]:
    """The door of an address, and the address cut in two: up to the root of the files, and the path from there.

    raises  CloudError bad-gateway, forbidden
    """
    for door in DOORS:
        count = len(door.names) + door.owned
        if address[:len(door.names)] == door.names and len(address) >= count:
            return door, address[:count], address[count:]
    raise CloudError("bad-gateway", "this is not an address of files")


def dav_error(error: CloudError, request: Request, *parts: Markup) -> Response:
    """A refusal as WebDAV words it (RFC 4918 s16), with the sentence for people."""
    if error.condition:
        held = [E("d:href", dav_href(request, error.detail["path"]))] if error.detail.get("path") is not None else []
        parts += (E("d:" + error.condition, *held),)
    body = E("d:error", *parts, E("s:message", str(error)), **ROOT_NAMESPACES)
    response = Response(error.status, format_xml(body) + b"\n", {"Content-Type": XML_TYPE, "Cache-Control": "no-store",
                                                                 **error_fields(error)})
    response.close = error.close
    return response


def dav_href(request: Request, path: Sequence[str], collection: bool = False) -> str:
    """The address of a path, through the door by which the request came."""
    href = request.href(find_door(request.path)[1] + tuple(path))
    return href + "/" if collection or not path else href


def dav_route(methods: str, needs: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    return route(methods, DAV, needs=needs, refuse=dav_error)


# ---- what a request says

def read_dav_conditions(request: Request) -> Preconditions:
    """The conditions of a request, those of WebDAV's If field included (RFC 4918 s10.4)."""
    given = read_conditions(request)
    if "if" not in request.fields:
        return given
    lists = parse_if(request.fields["if"])
    tokens = frozenset(value for _, conditions in lists for _, kind, value in conditions if kind == "token")
    return replace(given, tokens=tokens, lists=tuple(
        (None if resource is None else read_resource(request, resource), conditions) for resource, conditions in lists))


_USERINFO = re.compile(r"\A(https?://)[^/?#]*@", re.I)


def read_resource(request: Request, uri: str) -> tuple[str, ...]:
    """The path that a URI in a field names.  raises CloudError bad-gateway for one on another server

    What stands before an @ is dropped: git push sends the name and password of its own address along.
    """
    authority, path, _, _ = parse_target(_USERINFO.sub(r"\1", uri, 1))
    if authority and authority.lower() != request.fields["host"].lower() and not request.site.knows(authority):
        raise CloudError("bad-gateway", "the destination is on another server")
    below_prefix = request.prefix and path[:len(request.prefix)] == request.prefix
    door, above, below = find_door(path[len(request.prefix):] if below_prefix else path)
    if door.owned:
        check_owner(request.who, above[-1])
    return below


def check_owner(who: Principal, name: str) -> None:
    """raises CloudError not-found unless an address names the account of who asks"""
    if account_key(name) != account_key(who.name):
        raise CloudError("not-found", "there is nothing at this address")


def read_destination(request: Request) -> tuple[str, ...]:
    if "destination" not in request.fields:
        raise CloudError("bad-request", "Destination is missing")
    uri = request.fields["destination"]
    return read_resource(request, uri if uri.isascii() else quote(uri.encode("latin-1"), safe="/:%?=&+~!$'()*,;@[]"))


def read_body(request: Request) -> ET.Element | None:
    """The XML of a request; None if it has no body."""
    if "content-encoding" in request.fields and request.fields["content-encoding"].lower() != "identity":
        raise CloudError("unsupported-media", "the body may not be encoded")
    body = request.body.read(XML_LIMIT)
    return read_xml(body) if body.strip() else None


def read_mtime(request: Request) -> int | None:
    """X-OC-Mtime, seconds since 1970 and perhaps a fraction: how ownCloud's, Nextcloud's and rclone's clients say it."""
    return parse_seconds(request["x-oc-mtime"])


def read_sums(request: Request) -> dict[str, str] | None:
    """OC-Checksum: what the bytes must have."""
    return dict([parse_checksum(request.fields["oc-checksum"])]) if "oc-checksum" in request.fields else None


# ---- files

class ListForm(NamedTuple):
    """How a collection is listed to those who do not speak WebDAV."""
    media: str
    head: str
    row: Callable[[Node, str], str]      # of a node and its address
    between: str
    tail: str


LIST_FORMS = {
    "json": ListForm("application/json", "[", lambda node, href: json.dumps({
        "name": node.name, "kind": "collection" if node.kind else "file", "size": node.size, "mtime": format_time(node.mtime),
        "etag": node.etag}, ensure_ascii=False), ",\n", "]\n"),
    "links": ListForm("text/html", "", lambda node, href: E("a", node.name + "/" * node.kind, href=href) + "\n", "", ""),
    "lines": ListForm("text/plain", "", lambda node, href: node.name + "/" * node.kind + "\n", "", "")}
FOLLOWS_LINKS = re.compile("wget|lftp", re.I)            # sees nothing in a plain list


def list_form(request: Request) -> ListForm:
    if "application/json" in request.fields.get("accept", ""):
        return LIST_FORMS["json"]
    return LIST_FORMS["links" if FOLLOWS_LINKS.match(request.fields.get("user-agent", "")) else "lines"]


@dav_route("GET", "read")
def dav_get(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Fetch a file; of a collection, the names: one per line, as JSON, as links, or to a browser as the page."""
    node, content = cloud.open(who, path)
    if content is not None:
        return content_response(request, node, content)
    if "text/html" in request.fields.get("accept", "") and "mozilla" in request.fields.get("user-agent", "").lower():
        up = "../" * (len(request.path) - (not request.slash))           # relative: we may be behind a prefix (B4)
        return Response(303, b"", {"Location": up + "files" + format_path(path), "Cache-Control": "no-store"})
    form = list_form(request)
    fields = {"Content-Type": form.media + "; charset=utf-8", "ETag": format_etag(node), "Cache-Control": PRIVATE,
              "Vary": "Accept, User-Agent", "Content-Security-Policy": SANDBOX}
    if unmet(read_conditions(request), node) == 304:
        return Response(304, b"", fields)
    spool, base, between = Spool(), dav_href(request, path, True), ""
    spool.write(form.head)
    with cloud.listing(who, path) as listing:
        for child in watched(listing.children(), request.check_alive):
            spool.write(between + form.row(child, base + quote(child.name, safe="~") + "/" * child.kind))
            between = form.between
    spool.write(form.tail)
    return spool.response(200, fields)


@dav_route("PUT", "write")
def dav_put(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Store a file.  ?parents=1 makes missing collections; X-OC-Mtime sets its time, OC-Checksum is verified."""
    fields = request.fields
    if "content-range" in fields:
        raise CloudError("bad-request", "partial writes go through /tus/")           # RFC 9110 s14.4
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise CloudError("unsupported-media", "the body may not be encoded")
    if request.slash:
        raise CloudError("conflict", "a file's address has no slash at its end")
    node, new = cloud.write(who, path, request.body, read_dav_conditions(request), mtime=read_mtime(request),
                            sums=read_sums(request), parents=bool(request.query) and request.argument("parents") == "1")
    return stored_response(request, node, new, dav_href(request, path))


def stored_response(request: Request, node: Node, new: bool, href: str) -> Response:
    """A node was made or replaced; with the fields ownCloud's and Nextcloud's clients look for."""
    fields = {"ETag": format_etag(node), "OC-ETag": format_etag(node), "OC-FileId": format_id(node), "Location": href}
    if "x-oc-mtime" in request.fields:
        fields["X-OC-MTime"] = "accepted"
    return Response(201 if new else 204, b"", fields)


@dav_route("DELETE", "write")
def dav_delete(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Move a file or collection to the trash."""
    if request["depth"] is not None and request.slash and parse_depth(request["depth"], "") != "infinity":
        raise CloudError("bad-request", "a collection goes with all below it")       # RFC 4918 s9.6.1
    cloud.delete(who, path, given=read_dav_conditions(request))
    return Response(204)


def mkcol_error(error: CloudError, request: Request) -> Response:
    """Something is there already: 405 (RFC 4918 s9.3.1)."""
    if error.kind == "exists":
        error = CloudError("method-not-allowed", str(error), allow=dav_allow(find_door(request.path)[2]))
    return dav_error(error, request)


@route("MKCOL", DAV, needs="write", refuse=mkcol_error)
def dav_mkcol(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Make a collection, with properties if the body sets some (RFC 5689)."""
    if request.body.length != 0 and "xml" not in request.fields.get("content-type", "xml").lower():
        raise CloudError("unsupported-media", "MKCOL does not know such a body")     # RFC 4918 s9.3
    body, properties = read_body(request), {}
    if body is not None:
        if body.tag != "{DAV:}mkcol":
            raise CloudError("unsupported-media", "MKCOL does not know such a body")
        for prop in body.iterfind("{DAV:}set/{DAV:}prop/*"):
            if prop.tag == "{DAV:}resourcetype":
                if [kind.tag for kind in prop] != ["{DAV:}collection"]:
                    raise CloudError("bad-resource-type", "only plain collections can be made")
            else:
                properties[prop.tag] = ET.tostring(prop, encoding="unicode").strip()
    node = cloud.make_collection(who, path, read_dav_conditions(request), properties=properties)
    return stored_response(request, node, True, dav_href(request, path, True))


@dav_route("MOVE COPY", "write")
def dav_transfer(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """MOVE or COPY to Destination; Overwrite: F spares what is there.

    Depth: 0 copies a collection without what it holds; everything else takes all along (RFC 4918 s9.8.3, s9.9.2).
    """
    target, clash = read_destination(request), "replace" if parse_overwrite(request["overwrite"]) else "refuse"
    given = read_dav_conditions(request)
    if request.method == "MOVE":
        (node, new), = cloud.move(who, (path, target), given=given, clash=clash)
    else:
        (node, new), = cloud.copy(who, (path, target), given=given, clash=clash,
                                  deep=parse_depth(request["depth"], "infinity") != "0", alive=request.check_alive)
    return stored_response(request, node, new, dav_href(request, target, bool(node.kind)))


@dav_route("OPTIONS", "nothing")
def dav_options(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """What this address can do.  MS-Author-Via makes Windows treat it as WebDAV."""
    return Response(200, b"", {"DAV": CLASSES, "Allow": dav_allow(path), "MS-Author-Via": "DAV"})


def dav_allow(path: tuple[str, ...]) -> str:
    return ("OPTIONS, GET, HEAD, PUT, DELETE, PROPFIND, PROPPATCH, MKCOL, COPY, MOVE, LOCK, UNLOCK, REPORT" if path else
            "OPTIONS, GET, HEAD, PROPFIND, PROPPATCH, LOCK, UNLOCK, REPORT")


# ---- properties

class About:
    """What live properties may need beside the node itself; fetched when first asked for."""

    def __init__(self, cloud: Cloud, who: Principal, listing: Listing) -> None:
        self.who, self.locks, self.tag_at = who, listing.locks, cloud.tag_at
        self._fetch = {"quota": lambda: cloud.quota(who), "digests": listing.digests, "dead": listing.properties,
                       "pictured": listing.pictured, "epoch": lambda: cloud.epoch}

    def __getattr__(self, name: str) -> Any:
        """quota: (used, left); digests: {manifest: ...}; dead: {node: {name: XML}}; pictured: {manifest}; epoch"""
        value = self.__dict__[name] = self._fetch[name]()
        return value


def format_etag(node: Node) -> str:
    return '"%s"' % node.etag


def format_sync_token(epoch: str, seq: int, tag: str) -> str:
    return "urn:cloudserver:sync:%s:%d:%s" % (epoch, seq, tag)


def format_id(node: Node) -> str:
    """The id as ownCloud's and Nextcloud's clients keep it: digits, which are oc:fileid, and a mark of the server."""
    return "%019docs" % node.node


def format_checksum(kind: str, value: str) -> str:
    """("sha1", "0a4d...") to "SHA1:0a4d...", the reverse of parse_checksum."""
    return "%s:%s" % (CHECKSUM_NAMES[kind], value)


CHECKSUM_NAMES = {kind: name for name, kind in _CHECKSUMS.items()}


def format_checksums(node: Node, about: About) -> Markup | None:
    """SHA1:... MD5:... in one element, as ownCloud's and Nextcloud's clients and rclone read it."""
    known = dict(about.digests.get(node.manifest, ()))
    if node.manifest[0] != "m":
        known["sha256"] = node.manifest
    return E("oc:checksum", " ".join(map(format_checksum, known, known.values()))) if known else None


def format_lock(lock: Lock, who: Principal) -> Markup:
    """An activelock element; the token is shown to its owner alone (A19)."""
    token = [E("d:locktoken", E("d:href", lock.token))] if lock.account == who.account else []
    return E("d:activelock", E("d:locktype", E("d:write")), E("d:lockscope", E("d:exclusive" if lock.exclusive else "d:shared")),
             E("d:depth", "infinity" if lock.deep else "0"), Markup(lock.owner), E("d:timeout", "Second-%d" % lock.seconds),
             *token)


LOCK_ENTRIES = Markup("".join(E("d:lockentry", E("d:lockscope", E(scope)), E("d:locktype", E("d:write")))
                              for scope in ("d:exclusive", "d:shared")))
REPORTS = E("d:supported-report", E("d:report", E("d:sync-collection")))
COLLECTION_TYPE = E("d:collection")

CHECKSUMS = "{http://owncloud.org/ns}checksums"
PROPERTIES: dict[str, Callable[[Node, About], Optional[str]]] = {   # live ones (RFC 4918 s15), as XML; a new one is a row
    "{DAV:}resourcetype": lambda node, about: COLLECTION_TYPE if node.kind else "",
    "{DAV:}getcontentlength": lambda node, about: None if node.kind else str(node.size),
    "{DAV:}getlastmodified": lambda node, about: format_http_date(node.mtime),
    "{DAV:}getetag": lambda node, about: format_etag(node),
    "{DAV:}getcontenttype": lambda node, about: None if node.kind else escape(node.media),
    "{DAV:}creationdate": lambda node, about: format_time(node.created),
    "{DAV:}displayname": lambda node, about: escape(node.name or "/"),
    "{DAV:}supportedlock": lambda node, about: LOCK_ENTRIES,
    "{DAV:}lockdiscovery": lambda node, about: "".join(format_lock(lock, about.who) for lock in about.locks(node)),
    "{DAV:}quota-used-bytes": lambda node, about: str(about.quota[0]) if node.kind else None,          # RFC 4331
    "{DAV:}quota-available-bytes": lambda node, about: str(about.quota[1]) if node.kind else None,
    "{DAV:}supported-report-set": lambda node, about: REPORTS if node.kind else "",                    # RFC 3253 s3.1.5
    "{DAV:}sync-token": lambda node, about: format_sync_token(about.epoch, node.seq, about.tag_at(node.seq)) if node.kind else None,   # RFC 6578 s4
    "{urn:schemas-microsoft-com:}Win32LastModifiedTime": lambda node, about: format_http_date(node.mtime),     # Windows
    CHECKSUMS: lambda node, about: None if node.kind else format_checksums(node, about),
    "{http://owncloud.org/ns}size": lambda node, about: str(node.size),
    "{http://owncloud.org/ns}fileid": lambda node, about: str(node.node),
    "{http://owncloud.org/ns}id": lambda node, about: format_id(node),
    "{http://owncloud.org/ns}permissions": lambda node, about: (
        "G" if about.who.readonly else "RGDNVCK" if node.kind else "RGDNVW"),
}
DOORS.append(Door(("dav",), False, PROPERTIES))
ALLPROP = tuple(PROPERTIES)[:9]                  # RFC 4918 s9.1: what RFC 4918 itself defines
KEPT: set[str] = set()                           # live ones that show what was stored as a dead one
SETTABLE: dict[str, Callable[[str], Optional[int]]] = {  # live properties that set the time of a node, and how to read them
    "{DAV:}getlastmodified": parse_http_date,                                                  # Nextcloud's clients
    "{DAV:}lastmodified": lambda text: int(text) * 1000 if re.fullmatch(r"\d{1,11}", text) else None,          # rclone
    "{urn:schemas-microsoft-com:}Win32LastModifiedTime": parse_http_date,                      # Windows
}


def property_reader(door: Door, name: str) -> Callable[[Node, About], Optional[str]]:
    """How to get a property of a node; a dead one comes as the element it was stored as."""
    return door.properties.get(name) or (lambda node, about: about.dead.get(node.node, {}).get(name))


class Multistatus:
    """Writes a 207 answer (RFC 4918 s13), a response at a time.

    Which properties a node has decides on a shape; each shape is built by E once, and then only filled in.
    """

    def __init__(self, names: Sequence[str] = (), door: Door | None = None, *, values: bool = True,
                 complete: bool = True) -> None:
        """
        names      of the properties asked for
        door       that knows which of them are live
        values     False: their names alone (propname)
        complete   whether to tell of those a node lacks
        """
        self.names, self.live, self.values, self.complete = names, door.properties if door else {}, values, complete
        self._shapes: dict[tuple[bool, ...], str] = {}
        self._spool = Spool()
        head, _, self._tail = E("d:multistatus", Markup("\0"), **ROOT_NAMESPACES).partition("\0")
        self._spool.write(format_xml(Markup(head)).decode())

    def add(self, href: str, values: Sequence[str | None]) -> None:
        """A response with one value, or None, for each of the names; values are XML."""
        present = tuple([value is not None for value in values])
        shape = self._shapes.get(present) or self._shape(present)
        if not self.values:
            values = ()
        self._spool.write(shape % (href, *[value for value in values if value is not None]))

    def _shape(self, present: tuple[bool, ...]) -> str:
        found = [self._slot(name) for name, here in zip(self.names, present) if here]
        missing = [E(name) for name, here in zip(self.names, present) if not here] if self.complete else []
        parts = [propstat(200, found)] if found or not missing else []
        if missing:
            parts.append(propstat(404, missing))         # last: iOS reads the first alone, ownCloud leaks an empty one
        shape = E("d:response", E("d:href", Markup("\0")), *parts) + "\n"
        return self._shapes.setdefault(present, shape.replace("%", "%%").replace("\0", "%s"))

    def _slot(self, name: str) -> Markup:
        if not self.values:
            return E(name)
        return E(name, Markup("\0")) if name in self.live else Markup("\0")

    def add_part(self, *parts: Markup) -> None:
        self._spool.write("".join(parts) + "\n")

    def response(self) -> Response:
        self._spool.write(self._tail + "\n")
        return self._spool.response(207, {"Content-Type": XML_TYPE, "Cache-Control": PRIVATE})


def propstat(status: int, properties: Iterable[Markup], *more: Markup) -> Markup:
    return E("d:propstat", E("d:prop", *properties), E("d:status", "HTTP/1.1 %d %s" % (status, REASONS[status])), *more)


PROPERTIES_MOST = 256           # names in one question; clients ask for up to a few dozen


def read_names(props: Iterable[ET.Element]) -> tuple[str, ...]:
    """The names of properties that a client asks for, each once.  raises CloudError too-large"""
    names = tuple(dict.fromkeys(prop.tag for prop in props))
    if len(names) > PROPERTIES_MOST:
        raise CloudError("too-large", "ask for at most %d properties at a time" % PROPERTIES_MOST)
    return names


def read_propfind(body: ET.Element | None) -> tuple[tuple[str, ...] | None, bool]:
    """The names a PROPFIND asks for, None for all; and whether it wants values (RFC 4918 s14.20)."""
    if body is None:
        return None, True
    kinds = [part.tag for part in body if part.tag in ("{DAV:}prop", "{DAV:}allprop", "{DAV:}propname")]
    if body.tag != "{DAV:}propfind" or len(kinds) != 1:
        raise CloudError("bad-request", "ask for prop, allprop or propname")
    if kinds[0] == "{DAV:}prop":
        return read_names(body.find("{DAV:}prop")), True
    return None, kinds[0] == "{DAV:}allprop"


@dav_route("PROPFIND", "read")
def dav_propfind(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Properties of a node and, unless Depth is 0, of what it holds.

    infinity is refused for a collection (RFC 4918 s9.1), where a shallow answer would look complete; no Depth is 1, as
    with Nextcloud.
    """
    names, values = read_propfind(read_body(request))
    depth = parse_depth(request["depth"], "1")
    door = find_door(request.path)[0]
    with cloud.listing(who, path) as listing:
        if depth == "infinity" and listing.node.kind:
            raise CloudError("infinite-depth", "ask for Depth 0 or 1")
        about, asked = About(cloud, who, listing), names is not None
        if not asked:
            names = ALLPROP + tuple(sorted({name for found in about.dead.values() for name in found}))
        answer = Multistatus(names, door, values=values, complete=asked and not is_minimal(request))
        readers = [property_reader(door, name) for name in names]
        base = dav_href(request, path, bool(listing.node.kind))
        answer.add(base, [read(listing.node, about) for read in readers])
        for node in watched(listing.children(), request.check_alive) if depth == "1" and listing.node.kind else ():
            name = node.name if _PLAIN.fullmatch(node.name) else quote(node.name, safe="~")
            answer.add(base + name + "/" * node.kind, [read(node, about) for read in readers])
    return answer.response()


def is_minimal(request: Request) -> bool:
    """Does the client not want to hear of what is missing? (RFC 8144)"""
    return "return=minimal" in request.fields.get("prefer", "") or request.fields.get("brief", "").lower() == "t"


@dav_route("PROPPATCH", "write")
def dav_proppatch(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Set and remove properties, all or none (RFC 4918 s9.2)."""
    body = read_body(request)
    if body is None or body.tag != "{DAV:}propertyupdate":
        raise CloudError("bad-request", "this is not a propertyupdate")
    properties: dict[str, str | None] = {}
    mtime, verdicts = None, {}
    live = set(find_door(request.path)[0].properties) - KEPT
    for step in body:
        for prop in step.iterfind("{DAV:}prop/*"):
            if step.tag == "{DAV:}set" and prop.tag in SETTABLE:
                mtime = SETTABLE[prop.tag]((prop.text or "").strip())
                verdicts[prop.tag] = 200 if mtime is not None else 409
            elif step.tag == "{DAV:}set" and prop.tag == CHECKSUMS:
                verdicts[prop.tag] = 200 if has_checksums(cloud, who, request, path, "".join(prop.itertext())) else 409
            elif prop.tag in live:
                verdicts[prop.tag] = 403
            elif step.tag in ("{DAV:}set", "{DAV:}remove"):
                properties[prop.tag] = ET.tostring(prop, encoding="unicode").strip() if step.tag == "{DAV:}set" else None
                verdicts[prop.tag] = 200
    if not verdicts:
        raise CloudError("bad-request", "no property is named")
    if set(verdicts.values()) == {200}:
        node = cloud.patch(who, path, read_dav_conditions(request), properties=properties, mtime=mtime)
    else:
        node = cloud.stat(who, path)
        verdicts = {name: 424 if verdict == 200 else verdict for name, verdict in verdicts.items()}
    answer = Multistatus()
    answer.add_part(E("d:response", E("d:href", dav_href(request, path, bool(node.kind))), *(
        propstat(status, [E(name) for name, verdict in verdicts.items() if verdict == status],
                 *([E("d:error", E("d:cannot-modify-protected-property"))] if status == 403 else []))
        for status in sorted(set(verdicts.values())))))
    return answer.response()


def has_checksums(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], text: str) -> bool:
    """Does a file have these checksums?  rclone 1.76, vendor owncloud, sets them again whenever it sets the time."""
    return all(cloud.checksum(who, path, kind, request.check_alive)[1] == value for kind, value in map(parse_checksum, text.split()))


# ---- locks (RFC 4918 s9.10, s9.11)

@dav_route("LOCK", "write")
def dav_lock(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Take a write lock, or refresh one that If names.  Locking nothing makes an empty file."""
    body, given, new = read_body(request), read_dav_conditions(request), False
    seconds = parse_timeout(request["timeout"], LOCK_DEFAULT, LOCK_MOST)
    if body is None or given.tokens and request.fields["if"][:1] not in "(<":    # webdav 5 for JavaScript refreshes with a body
        lock = cloud.refresh(who, path, given.tokens, seconds)
    else:
        depth = parse_depth(request["depth"], "infinity")
        scope = [part.tag for part in body.iterfind("{DAV:}lockscope/*")]
        kind = [part.tag for part in body.iterfind("{DAV:}locktype/*")]
        owner = body.find("{DAV:}owner")
        if (body.tag, kind, depth) not in (("{DAV:}lockinfo", ["{DAV:}write"], "0"), ("{DAV:}lockinfo", ["{DAV:}write"], "infinity")) \
                or scope not in (["{DAV:}exclusive"], ["{DAV:}shared"]):
            raise CloudError("bad-request", "only write locks, exclusive or shared, of Depth 0 or infinity are known")
        text = "" if owner is None else ET.tostring(owner, encoding="unicode").strip()
        if len(text) > 4 * KiB:
            raise CloudError("bad-request", "the owner of a lock may have 4 KiB")
        lock, new = cloud.lock(who, path, given, deep=depth == "infinity", exclusive=scope == ["{DAV:}exclusive"], owner=text,
                               seconds=seconds)
    answer = E("d:prop", E("d:lockdiscovery", format_lock(lock, who)), **ROOT_NAMESPACES)
    return Response(201 if new else 200, format_xml(answer), {
        "Content-Type": XML_TYPE, "Cache-Control": "no-store", **({"Lock-Token": "<%s>" % lock.token} if body is not None else {})})


@dav_route("UNLOCK", "write")
def dav_unlock(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """End the lock that Lock-Token names."""
    cloud.unlock(who, path, parse_lock_token(request.fields.get("lock-token", "")))
    return Response(204)


# ---- what changed (RFC 6578)

@dav_route("REPORT", "read")
def dav_report(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A report on a collection (RFC 3253 s3.6); its body says which."""
    body = read_body(request)
    if body is None or body.tag not in REPORT_KINDS:
        raise CloudError("no-such-report", "only %s are known" % ", ".join(map(local_name, REPORT_KINDS)))
    return REPORT_KINDS[body.tag](cloud, who, request, path, body)


def local_name(tag: str) -> str:
    """A name without its namespace."""
    return tag.rpartition("}")[2]


def dav_changes(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], body: ET.Element) -> Response:
    """sync-collection: what changed below a collection since a token."""
    names = read_names(body.iterfind("{DAV:}prop/*"))
    level = (body.findtext("{DAV:}sync-level") or request.fields.get("depth", "1")).strip().lower()
    limit = (body.findtext("{DAV:}limit/{DAV:}nresults") or "10000").strip()
    if level not in ("1", "infinite", "infinity") or not re.fullmatch(r"[1-9]\d{0,6}", limit):
        raise CloudError("bad-request", "malformed sync-collection")
    token = (body.findtext("{DAV:}sync-token") or "").strip()
    with cloud.listing(who, path) as listing:
        if not listing.node.kind:
            raise CloudError("no-such-report", "only a collection can be synced")
        door = find_door(request.path)[0]
        about, answer = About(cloud, who, listing), Multistatus(names, door, complete=not is_minimal(request))
    readers = [property_reader(door, name) for name in names]
    reached, rows = sync_rows(cloud, who, path, read_sync_token(cloud, token), int(limit), request.check_alive)
    for below, kind, node in rows:
        if level == "1" and len(below) > 1:
            continue
        href = dav_href(request, path + below, bool(kind))
        if node is None:
            answer.add_part(E("d:response", E("d:href", href), E("d:status", "HTTP/1.1 404 Not Found")))
        else:
            answer.add(href, [read(node, about) for read in readers])
    answer.add_part(E("d:sync-token", format_sync_token(cloud.epoch, reached, cloud.tag_at(reached))))
    return answer.response()


REPORT_KINDS: dict[str, Callable[..., Response]] = {"{DAV:}sync-collection": dav_changes}


def read_sync_token(cloud: Cloud, text: str) -> int | None:
    """The seq in a sync token; None for the first sync.  raises CloudError bad-sync-token, other-history"""
    if not text:
        return None
    found = re.fullmatch(r"urn:cloudserver:sync:([0-9a-f]+):(\d{1,18})(?::([0-9a-f]*))?", text)
    if not found or found[1] != cloud.epoch:
        raise CloudError("bad-sync-token", "this sync token is not one of this server")
    cloud.check_history(None, int(found[2]), found[3])
    return int(found[2])


def sync_rows(cloud: Cloud, who: Principal, path: tuple[str, ...], since: int | None, limit: int,
              alive: Callable[[], None]) -> tuple[int, list[tuple[tuple[str, ...], int, Optional[Node]]]]:
    """The seq reached and (path, kind, node or None for gone) of what changed; everything if `since` is None."""
    if since is None:
        reached, changed, rows = cloud.head(), [], {below: (node.kind, node) for below, node in watched(cloud.walk(who, path), alive)}
    else:
        reached, changed = cloud.changes(who, path, since, limit, alive)
        rows = {change.was: (change.kind, None) for change in changed if change.was is not None and change.was != change.path}
    for change in changed:
        if change.path is not None:
            rows[change.path] = change.kind, change.node
            if change.kind and change.was != change.path:                # it came with all that hangs below
                rows.update((change.path + below, (node.kind, node))
                            for below, node in watched(cloud.walk(who, path + change.path), alive))
    return reached, [(below, *row) for below, row in rows.items()]


# ==== 12. Nextcloud dialect ==============================================================
#
# What Nextcloud's and ownCloud's clients ask beside WebDAV: discovery, OCS, the login flow, uploads in chunks and in
# bulk, trash, versions, search.  Words are translated to one Cloud call and back; the files themselves are served by
# the WebDAV room, through two more doors with more properties.  Nothing is announced that is not there.

NC_VERSION = "28.0.4.1"         # whose dialect this is; clients refuse a server that calls itself too old
PHP = ("", "/index.php")        # clients put either before an address
OC, NC = "{http://owncloud.org/ns}", "{http://nextcloud.org/ns}"


# ---- discovery

@route("GET", "/status.php", needs="nothing")
def nc_status(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Is there a server, and of what version?"""
    return json_response(nc_about(cloud))


def nc_about(cloud: Cloud) -> dict[str, Any]:
    return {"installed": cloud.accounts.is_set_up(), "maintenance": False, "needsDbUpgrade": False, "version": NC_VERSION,
            "versionstring": NC_VERSION.rpartition(".")[0], "edition": "", "productname": "cloudserver",
            "extendedSupport": True}     # else Android's app warns of an old server


def ocs_route(methods: str, name: str, needs: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Enter a handler under both versions of OCS."""
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        for version in ("v1.php", "v2.php"):
            route(methods, "/ocs/%s/%s" % (version, name), needs=needs, refuse=ocs_error)(handler)
        return handler
    return enter


OCS_CODES = {401: 997, 404: 998, 500: 996}       # what version 1 says instead of HTTP's


def ocs_response(request: Request, data: Any, status: int = 200, message: str = "OK", **fields: str) -> Response:
    """An envelope, as JSON or XML.  Version 1 answers 200 to what it does not know, and 100 for well done."""
    first, good = request.path[1] == "v1.php", status == 200
    answer = {"meta": {"status": "ok" if good else "failure", "message": message, "totalitems": "", "itemsperpage": "",
                       "statuscode": (100 if good else OCS_CODES.get(status, status)) if first else status}, "data": data}
    wants_json = request.argument("format") == "json" or "json" in request.fields.get("accept", "")
    body, media = ((format_json({"ocs": answer}), "application/json; charset=utf-8") if wants_json else
                   (format_xml(ocs_element("ocs", answer)), XML_TYPE))
    return Response(200 if first and status == 404 else status, body, {"Content-Type": media, "Cache-Control": "no-store", **fields})


def ocs_element(name: str, value: Any) -> Markup:
    """Version 1's XML of what JSON says: lists are elements called element, true is 1, false is nothing."""
    if isinstance(value, dict):
        return E(name, *(ocs_element(key, below) for key, below in value.items()))
    if isinstance(value, (list, tuple)):
        return E(name, *(ocs_element("element", below) for below in value))
    return E(name, {True: "1", False: "", None: ""}[value] if value is None or isinstance(value, bool) else str(value))


def ocs_error(error: CloudError, request: Request) -> Response:
    response = ocs_response(request, [], error.status, str(error), **error_fields(error))
    response.close = error.close
    return response


@ocs_route("GET POST PUT DELETE", "<path>", "nothing")
def ocs_unknown(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """What is not here: sharing between accounts, notifications, activity, and whatever will be thought of."""
    raise CloudError("not-found", "this server has no such function")


@ocs_route("GET", "cloud/capabilities", "nothing")
def ocs_capabilities(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What this server can do; without it, and to anybody, for the desktop client asks before it logs in."""
    major, minor, micro, _ = map(int, NC_VERSION.split("."))
    version = {"major": major, "minor": minor, "micro": micro, "string": NC_VERSION.rpartition(".")[0], "edition": "",
               "extendedSupport": True}
    return ocs_response(request, {"version": version, "capabilities": {
        "core": {"pollinterval": 60, "webdav-root": "remote.php/webdav", "status": nc_about(cloud)},
        "dav": {"chunking": "1.0", "invalidFilenameRegex": BAD_NAMES[cloud.config.windows_names],
                **({"bulkupload": "1.0"} if knows_bulk(request.fields.get("user-agent", "")) else {})},
        "files": {"bigfilechunking": True, "undelete": True, "versioning": True, "favorites": True, "blacklisted_files": [],
                  "forbidden_filename_characters": BAD_CHARACTERS[cloud.config.windows_names]},
        "files_sharing": {"api_enabled": False, "resharing": False, "public": {"enabled": False}},
        "checksums": {"supportedTypes": list(_CHECKSUMS), "preferredUploadType": "SHA1"}}})


BAD_NAMES = {"allow": r"[\\\x00-\x1f\x7f]", "refuse": r'[\\\x00-\x1f\x7f<>:"|?*]|[. ]$'}
BAD_CHARACTERS = {"allow": ["\\"], "refuse": list('\\<>:"|?*')}


def knows_bulk(agent: str) -> bool:
    """Nextcloud's desktop client before 3.10 announces an empty file in a bulk and sends none, for ever."""
    found = re.search(r"mirall/(\d{1,4})\.(\d{1,4})", agent)
    return bool(found) and "nextcloud" in agent.lower() and (int(found[1]), int(found[2])) >= (3, 10)


@ocs_route("GET", "cloud/user", "read")
def ocs_user(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Who is logged in; `id` is what goes into addresses."""
    used, left = cloud.quota(who)
    return ocs_response(request, {
        "id": who.name, "enabled": True, "display-name": who.name, "displayname": who.name, "email": "", "phone": "",
        "address": "", "website": "", "twitter": "", "fediverse": "", "organisation": "", "role": "", "headline": "", "biography": "",
        "profile_enabled": "0", "groups": [], "subadmin": [], "language": "en", "locale": "en", "backend": "Database",
        "backendCapabilities": {"setDisplayName": False, "setPassword": False}, "lastLogin": cloud.clock.wall(), "manager": "",
        "additional_mail": [], "notify_email": None,
        "quota": {"free": left, "used": used, "total": used + left, "relative": round(used / max(1, used + left) * 100, 2),
                  "quota": used + left}})


@ocs_route("GET", "cloud/users/<name>", "read")
def ocs_named_user(cloud: Cloud, who: Principal, request: Request, name: str) -> Response:
    """The same; nobody is told of others."""
    check_owner(who, name)
    return ocs_user(cloud, who, request)


@ocs_route("GET", "apps/files_sharing/api/v1/shares", "read")
@ocs_route("GET", "core/navigation/apps", "read")
def ocs_nothing(cloud: Cloud, who: Principal, request: Request) -> Response:
    """There are none."""
    return ocs_response(request, [])


@ocs_route("GET", "apps/files_sharing/api/v1/sharees", "read")
def ocs_sharees(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Nobody to share with."""
    none: dict[str, Any] = {"users": [], "groups": [], "remotes": []}
    return ocs_response(request, {"exact": none, **none})


# ---- logging in: a browser lets the device in, which then gets an app password

def nc_login_route(methods: str, name: str, needs: str, refuse: Callable[[CloudError, Request], Response] = json_error,
                   ) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        for before in PHP:
            route(methods, before + name, needs=needs, refuse=refuse)(handler)
        return handler
    return enter


def base_url(request: Request) -> str:
    """This server as the client calls it."""
    return "%s://%s%s" % ("https" if request.https else "http", request.fields.get("host", "localhost"),
                          request.href(()).rstrip("/"))


AGENTS = (  # what clients call themselves, and what people call them
    (r"\(([^()]{1,40})\) mirall/([\d.]{1,20})[^\d.].*owncloud", "ownCloud desktop {1}, {0}"),
    (r"\(([^()]{1,40})\) mirall/([\d.]{1,20})", "Nextcloud desktop {1}, {0}"),
    (r"Nextcloud-android/([\d.]{1,20})", "Nextcloud for Android {0}"),
    (r"Nextcloud-iOS/([\d.]{1,20})", "Nextcloud for iOS {0}"))


def device_name(request: Request) -> str:
    """What to call the device that sends this."""
    agent = request.fields.get("user-agent", "").strip()[:300]
    for pattern, name in AGENTS:
        found = re.search(pattern, agent, re.I)
        if found:
            return name.format(*found.groups())
    return agent[:100] or "device"


@nc_login_route("POST", "/login/v2", "nothing")
def nc_login(cloud: Cloud, who: Principal, request: Request) -> Response:
    """A device wants in: what it shall open in a browser, and where it then asks for its app password."""
    check_safe(request)
    poll, token = cloud.accounts.begin_pairing(device_name(request), request.address)
    base = base_url(request)
    return json_response({"poll": {"token": poll, "endpoint": base + "/login/v2/poll"}, "login": base + "/login/v2/flow/" + token,
                          "code": pairing_code(token)})        # of ours: for whoever can show it


def nc_poll_error(error: CloudError, request: Request) -> Response:
    return json_response([], 404) if error.kind == "not-found" else json_error(error, request)


@nc_login_route("POST", "/login/v2/poll", "nothing", nc_poll_error)
def nc_poll(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The app password, once somebody let the device in; iOS sends the token in the query."""
    check_safe(request)
    form = parse_query(request.body.read(64 * KiB).decode("utf-8", "replace"))
    name, secret = cloud.accounts.collect(form.get("token") or request.argument("token") or "")
    return json_response({"server": base_url(request), "loginName": name, "appPassword": secret})


@ocs_route("GET", "core/getapppassword", "password")
def ocs_app_password(cloud: Cloud, who: Principal, request: Request) -> Response:
    """An app password in exchange for the account's own."""
    _, secret = cloud.accounts.add_token(who, device_name(request))
    return ocs_response(request, {"apppassword": secret})


@ocs_route("DELETE", "core/apppassword", "read")
def ocs_drop_app_password(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The device logs out: its app password ends."""
    if who.means != "token":
        raise CloudError("forbidden", "this is not an app password")
    cloud.accounts.revoke(who, who.device)
    return ocs_response(request, [])


# ---- files: two doors into WebDAV

def stored_text(node: Node, about: About, name: str) -> str:
    """The text of a dead property, "" if there is none."""
    found = re.search(">([^<]*)<", about.dead.get(node.node, {}).get(name, ""))
    return found[1] if found else ""


FAVORITE, LIVE_PHOTO = STAR, NC + "metadata-files-live-photo"
KEPT.update([FAVORITE, LIVE_PHOTO])
NC_PROPERTIES: dict[str, Callable[[Node, About], Optional[str]]] = {
    **PROPERTIES,
    "{DAV:}getlastmodified": lambda node, about: format_http_date(max(node.mtime, SECOND)),  # Nextcloud's refuses times before
    OC + "data-fingerprint": lambda node, about: about.epoch,            # changes with a restored backup: nothing is deleted then
    OC + "owner-id": lambda node, about: escape(about.who.name),
    OC + "owner-display-name": lambda node, about: escape(about.who.name),
    OC + "share-types": lambda node, about: "",
    OC + "comments-unread": lambda node, about: "0",
    FAVORITE: lambda node, about: stored_text(node, about, FAVORITE) or "0",
    LIVE_PHOTO: lambda node, about: stored_text(node, about, LIVE_PHOTO) or None,           # iOS: the name of its other half
    NC + "is-encrypted": lambda node, about: "0",
    NC + "has-preview": lambda node, about: "true" if not node.kind and node.manifest in about.pictured else "false",
    NC + "mount-type": lambda node, about: "",
    NC + "creation_time": lambda node, about: str(node.created // SECOND),
    NC + "upload_time": lambda node, about: str(node.created // SECOND),
    **dict.fromkeys([OC + name for name in "downloadURL dDC tags privatelink comments-count".split()] + [
        NC + name for name in "note sharees rich-workspace rich-workspace-file hidden system-tags is-mount-root share-attributes "
        "lock lock-owner lock-owner-displayname lock-owner-editor lock-owner-type lock-time lock-timeout lock-token "
        "metadata-photos-size metadata-photos-gps metadata-photos-exif metadata-photos-place "
        "metadata-photos-original_date_time metadata_etag file-metadata-size file-metadata-gps share-download-limits "
        "contained-folder-count contained-file-count download-url-expiration "
        "trashbin-filename trashbin-original-location trashbin-deletion-time version-label version-author".split()],
        lambda node, about: None)}               # asked in every listing; known not to be there
NC_FILES = Door(("remote.php", "dav", "files"), True, NC_PROPERTIES)
DOORS.extend([NC_FILES, Door(("remote.php", "webdav"), False, NC_PROPERTIES)])
NC_CLASSES = CLASSES + ", nextcloud-checksum-update"
NC_METHODS = "OPTIONS, GET, HEAD, PUT, PATCH, DELETE, PROPFIND, PROPPATCH, MKCOL, COPY, MOVE, LOCK, UNLOCK, REPORT, SEARCH"

EXCEPTIONS = {  # status: what Nextcloud's server would call it; clients look at a few of the names
    400: "BadRequest", 401: "NotAuthenticated", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed", 409: "Conflict",
    412: "PreconditionFailed", 413: "PayloadTooLarge", 415: "UnsupportedMediaType", 416: "RequestedRangeNotSatisfiable",
    423: "Locked", 429: "TooManyRequests", 501: "NotImplemented", 503: "ServiceUnavailable", 507: "InsufficientStorage"}
PASSING = {"busy"}              # of the 503s: concerns this request alone, while ServiceUnavailable ends the whole run


def nc_error(error: CloudError, request: Request) -> Response:
    name = "Conflict" if error.kind in PASSING else EXCEPTIONS.get(error.status, "Exception")
    error.detail.pop("path", None)
    return dav_error(error, request, E("s:exception", "Sabre\\DAV\\Exception\\" + name))


def nc_mkcol_error(error: CloudError, request: Request) -> Response:
    """Something is there already: 405, which clients take for done."""
    return nc_error(CloudError("method-not-allowed", str(error), allow=NC_METHODS) if error.kind == "exists" else error, request)


def for_owner(handler: Callable[..., Response]) -> Callable[..., Response]:
    """A handler of addresses that go on with the name of the account."""
    def enter(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
        check_owner(who, path[0] if path else "")
        return handler(cloud, who, request, path[1:])
    return enter


def nc_route(methods: str, needs: str, refuse: Callable[[CloudError, Request], Response] = nc_error,
             ) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Enter a handler of an account's files at both their addresses."""
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        route(methods, "/remote.php/webdav/<path>", needs=needs, refuse=refuse)(handler)
        route(methods, "/remote.php/dav/files/<path>", needs=needs, refuse=refuse)(for_owner(handler))
        return handler
    return enter


def done_once(handler: Callable[..., Response]) -> Callable[..., Response]:
    """A write that is done once, even if it comes twice.

    When a connection breaks before the answer, Qt sends the request again by itself, with the same X-Request-ID; a
    repeated MOVE that found nothing any more would leave Nextcloud's client with a damaged journal.
    """
    def enter(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
        if not re.fullmatch(r"[0-9A-Fa-f-]{32,36}", request.fields.get("x-request-id", "")):
            return handler(cloud, who, request, path)
        op = sha256_text("\n".join([str(who.account), str(who.root), request.method, *path, *(
            request.fields.get(name, "") for name in SAME_REQUEST)]))
        return cloud.once(op, lambda acting: handler(acting, who, request, path)) or nc_again(cloud, who, request, path, op)
    return enter


SAME_REQUEST = ("x-request-id", "destination", "overwrite", "if", "if-match", "content-length", "oc-checksum", "x-oc-mtime")


def nc_again(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], op: str) -> Response:
    """The answer to a request that was carried out before."""
    if request.method == "DELETE":
        return Response(204)
    place = read_destination(request) if request.method in ("MOVE", "COPY") else path
    node = cloud.stat(who, place)
    if request.method == "PUT" and node.rev != cloud.done(op):
        raise CloudError("precondition-failed", "it has changed since")
    return stored_response(request, node, True, dav_href(request, place, bool(node.kind)))


@nc_route("GET", "read")
def nc_get(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A file, with what clients compare it by."""
    node, content = cloud.open(who, path)
    if content is None:
        return dav_get(cloud, who, request, path)
    response = content_response(request, node, content)
    response.fields.update({"OC-ETag": format_etag(node), "OC-FileId": format_id(node)})
    sums = cloud.sums(node)
    for kind in ("sha1", "sha256"):
        if kind in sums:
            response.fields["OC-Checksum"] = format_checksum(kind, sums[kind])
            break
    return response


@nc_route("PATCH", "write")
def nc_checksum(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """X-Recalculate-Hash: what is the checksum of the file?  rclone asks after uploads and changes of the time that have none to show."""
    kind = _CHECKSUMS.get(request.fields.get("x-recalculate-hash", "").upper())
    if kind is None:
        raise CloudError("unprocessable", "X-Recalculate-Hash is one of %s" % ", ".join(_CHECKSUMS))
    node, value = cloud.checksum(who, path, kind, request.check_alive)
    return Response(204, b"", {"OC-Checksum": format_checksum(kind, value), "ETag": format_etag(node)})


@nc_route("PUT", "write")
@done_once
def nc_put(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A file, or the chunk of one as ownCloud's clients sent them before there were upload folders."""
    found = LEGACY.fullmatch(path[-1]) if path and "oc-chunked" in request.fields else None
    return nc_legacy_chunk(cloud, who, request, path[:-1] + (found[1],), *found.groups()[1:]) if found else dav_put(
        cloud, who, request, path)


for _methods, _needs, _handler in (
        ("PROPFIND", "read", dav_propfind), ("REPORT", "read", dav_report), ("PROPPATCH", "write", dav_proppatch),
        ("LOCK", "write", dav_lock), ("UNLOCK", "write", dav_unlock), ("DELETE", "write", done_once(dav_delete)),
        ("MOVE COPY", "write", done_once(dav_transfer))):
    nc_route(_methods, _needs)(_handler)
nc_route("MKCOL", "write", nc_mkcol_error)(done_once(dav_mkcol))


def nc_options(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...] = ()) -> Response:
    """What can be done here; Android looks for SEARCH."""
    return Response(200, b"", {"DAV": NC_CLASSES, "Allow": NC_METHODS})


for _address in ("/remote.php/dav", "/remote.php/dav/files/<path>", "/remote.php/webdav/<path>"):
    route("OPTIONS", _address, needs="nothing")(nc_options)


# ---- uploads in chunks
#
# A folder of the client's choice is made, chunks are put into it in any order, and a MOVE of its .file makes them one.
# Their names are numbers: offsets (ownCloud; rclone, with the end behind a dash), or counted from 0 or 1, with zeros before
# (Nextcloud, Android) or without (iOS).

NC_UPLOADS = "/remote.php/dav/uploads/<path>"
LEGACY = re.compile(r"(.+)-chunking-(\d{1,20})-(\d{1,6})-(\d{1,6})", re.S)


def upload_route(method: str, needs: str, refuse: Callable[[CloudError, Request], Response] = nc_error,
                 ) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        route(method, NC_UPLOADS, needs=needs, refuse=refuse)(for_owner(handler))
        return handler
    return enter


def read_chunk(path: tuple[str, ...]) -> tuple[str, Optional[int]]:
    """(name of the upload, number of the chunk or None) of an address.  raises CloudError not-found, bad-request"""
    if not 1 <= len(path) <= 2:
        raise CloudError("not-found", "there is nothing at this address")
    found = re.fullmatch(r"([0-9]{1,18})(?:-[0-9]{1,18})?", path[1]) if len(path) == 2 else None
    if len(path) == 2 and not found:
        raise CloudError("bad-request", "a chunk is named by a number")
    return path[0], int(found[1]) if found else None


@upload_route("MKCOL", "write", nc_mkcol_error)
def nc_begin(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Begin an upload; newer clients tell its size and place."""
    if len(path) != 1:
        raise CloudError("conflict", "an upload is one folder")
    cloud.begin_parts(who, path[0], read_number(request, "oc-total-length"),
                      read_destination(request) if "destination" in request.fields else None)
    return Response(201)


@upload_route("PUT", "write")
def nc_chunk(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """A chunk; whole or not at all."""
    name, number = read_chunk(path)
    if number is None:
        raise CloudError("conflict", "a chunk goes into an upload")
    return Response(201 if cloud.put_part(who, name, number, request.body) else 204)


@upload_route("PROPFIND", "read")
def nc_chunks(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """What has come of an upload, so that the client sends the rest."""
    names, values = read_propfind(read_body(request))
    _, chunks = cloud.parts(who, read_chunk(path)[0])
    names = names or ("{DAV:}resourcetype", "{DAV:}getcontentlength")
    answer = Multistatus(names, NC_FILES, values=values)
    base = request.href(request.path) + "/"
    answer.add(base, [{"{DAV:}resourcetype": COLLECTION_TYPE}.get(name) for name in names])
    for number, size in chunks if request["depth"] != "0" else ():
        about = {"{DAV:}resourcetype": "", "{DAV:}getcontentlength": str(size)}
        answer.add(base + str(number), [about.get(name) for name in names])
    return answer.response()


@upload_route("DELETE", "write")
def nc_drop(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Give up an upload, or a chunk of it."""
    cloud.drop_parts(who, *read_chunk(path))
    return Response(204)


@upload_route("MOVE", "write")
def nc_join(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Make the chunks a file.  Conditions are on what is there."""
    if len(path) != 2 or path[1] != ".file":
        raise CloudError("not-found", "there is nothing at this address")
    target, mtime = read_destination(request), read_mtime(request)
    node, new = cloud.join_parts(who, path[0], target, read_dav_conditions(request), mtime=mtime, sums=read_sums(request),
                                 size=read_number(request, "oc-total-length"))
    return stored_response(request, node, new, request.href(NC_FILES.names + (who.name,) + target))


def nc_legacy_chunk(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], transfer: str, count: str,
                    index: str) -> Response:
    """A chunk of a file that is put as NAME-chunking-TRANSFER-COUNT-INDEX; with the last one they become the file."""
    name = sha256_text("\n".join((transfer, *path)))
    cloud.begin_parts(who, name, read_number(request, "oc-total-length"), again=True)
    cloud.put_part(who, name, int(index), request.body)
    if len(cloud.parts(who, name)[1]) < int(count):
        return Response(201)                     # without any ETag: that means more is to come
    node, new = cloud.join_parts(who, name, path, read_dav_conditions(request), mtime=read_mtime(request), sums=read_sums(request))
    return stored_response(request, node, new, dav_href(request, path))


# ---- many small files in one request

@route("POST", "/remote.php/dav/bulk", needs="write", refuse=nc_error)
def nc_bulk(cloud: Cloud, who: Principal, request: Request) -> Response:
    """Files as parts of a multipart/related body; each is stored or refused by itself."""
    found = re.search(r'boundary="?([^";\s]{1,200})"?', request.fields.get("content-type", ""))
    if not found:
        raise CloudError("bad-request", "this is not multipart/related")
    answer, files = {}, read_bulk(request.body, found[1].encode("latin-1"))
    for place, outcome in cloud.write_each(who, itertools.islice(files, PAGE_LIMIT)):
        answer[place] = {"error": True, "message": str(outcome)} if isinstance(outcome, CloudError) else {
            "error": False, "etag": outcome.etag, "fileid": str(outcome.node), "OC-FileID": format_id(outcome),
            "permissions": "RGDNVW"}
    return json_response(answer)


BULK_PART = 16 * MiB            # clients send files of up to a hundredth of that in bulk


def read_bulk(body: Body, boundary: bytes) -> Iterator[Writing]:
    """The files in a bulk, one after the other."""
    lines = Lines(body)
    while True:
        line = lines.next()
        if line == b"--" + boundary + b"--":
            return
        if line == b"--" + boundary:
            fields = dict(itertools.islice(iter(partial(read_part_field, lines), None), FIELD_LIMIT))
            length = fields.get("content-length", "")
            if not _LENGTH.fullmatch(length) or int(length) > BULK_PART:
                raise CloudError("bad-request", "a part has no proper Content-Length")
            data = lines.take(int(length))
            yield bulk_file(fields, data)
        elif line:
            raise CloudError("bad-request", "malformed bulk")


def read_part_field(lines: "Lines") -> tuple[str, str] | None:
    line = lines.next()
    name, mark, value = line.decode("utf-8", "replace").partition(":")
    if line and not mark:
        raise CloudError("bad-request", "malformed bulk")
    return (name.strip().lower(), value.strip()) if line else None


def bulk_file(fields: dict[str, str], data: bytes) -> Writing:
    """One part of a bulk, as a write."""
    sums = dict([parse_checksum(fields["oc-checksum"])] if "oc-checksum" in fields else [])
    if "x-file-md5" in fields:
        sums.update([parse_checksum("MD5:" + fields["x-file-md5"])])
    given = Preconditions(if_match=parse_etags(fields["if-match"], weak=False)) if "if-match" in fields else ANY
    return Writing(fields.get("x-file-path", ""), Body(data), given,
                   parse_seconds(fields.get("x-file-mtime", fields.get("x-oc-mtime"))), sums)


class Lines:
    """A body read by lines and by counts."""

    def __init__(self, body: Body) -> None:
        self.body, self.rest = body, bytearray()

    def _more(self) -> None:
        piece = bytearray(RECEIVE)
        count = self.body.readinto(memoryview(piece))
        if not count:
            raise CloudError("bad-request", "the body ended early")
        self.rest += piece[:count]

    def next(self) -> bytes:
        while b"\r\n" not in self.rest:
            if len(self.rest) > LINE_LIMIT:
                raise CloudError("bad-request", "malformed bulk")
            self._more()
        line = self.take(self.rest.index(b"\r\n"))
        del self.rest[:2]
        return line

    def take(self, count: int) -> bytes:
        while len(self.rest) < count:
            self._more()
        data = bytes(self.rest[:count])
        del self.rest[:count]
        return data


# ---- previews: the thumbnails that browsers made

@route("GET", "/index.php/core/preview", needs="read")
@route("GET", "/index.php/core/preview.png", needs="read")
def nc_preview(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The thumbnail of a file, by its id or its path; whatever size is asked for, there is one."""
    asked = dict(parse_pairs(request.query))
    path = read_path(asked["file"]) if "file" in asked else cloud.path_of(who, read_file_id(asked.get("fileId", "")))
    answer = api_thumbnail_response(request, cloud.thumbnail(who, path))
    if answer.status == 204:
        raise CloudError("not-found", "there is no preview")
    return answer


def read_path(text: str) -> tuple[str, ...]:
    """A path in a query or a body; as in an address, slashes that repeat count as one."""
    return check_path(filter(None, text.split("/")))


def read_file_id(text: str) -> int:
    """The node of an oc:fileid, or of an oc:id, which is the same digits and a mark of the server (nc-py-api takes either)."""
    return parse_id(re.match("[0-9]{0,19}", text)[0])


@route("GET", "/index.php/apps/files/ajax/download.php", needs="read")
@route("GET", "/apps/files/ajax/download.php", needs="read")
def nc_download(cloud: Cloud, who: Principal, request: Request) -> Response:
    """A collection as an archive, or those of its members that `files` names, as JSON or one alone; a file alone comes as it is."""
    asked = parse_query(request.query)
    path, files = read_path(asked.get("dir", "")), asked.get("files", "")
    names = parse_json(b'{"names":%s}' % files.encode())["names"] if files[:1] == "[" else [files] if files else []
    paths = [split_path(name) for name in names]
    if len(paths) == 1:
        node, content = cloud.open(who, path + paths[0])
        if content is not None:
            return content_response(request, node, content)
    return zip_response(cloud, who, path, paths, None)


# ---- favourites and search

class Scattered(About):
    """What properties need of nodes that come from everywhere."""

    def __init__(self, cloud: Cloud, who: Principal) -> None:
        self.who, self.locks, self.tag_at = who, lambda node: [], cloud.tag_at
        self._fetch = {"epoch": lambda: cloud.epoch, "quota": lambda: cloud.quota(who), "digests": dict, "pictured": lambda: cloud.pictured(who), "dead": lambda: {
            node.node: {FAVORITE: value} for _, node, value in cloud.marked(who, FAVORITE)}}


def nc_rows(request: Request, about: About, base: tuple[str, ...], names: Sequence[str],
            rows: Iterable[tuple[tuple[str, ...], Node]]) -> Response:
    """A multistatus of nodes from everywhere, (path, node), below an address."""
    answer = Multistatus(names, NC_FILES, complete=not is_minimal(request))
    readers = [property_reader(NC_FILES, name) for name in names]
    for path, node in rows:
        answer.add(request.href(base + path) + "/" * node.kind, [read(node, about) for read in readers])
    return answer.response()


def nc_filter(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], body: ET.Element) -> Response:
    """filter-files: the favourites below a collection.  Of other rules, nothing here is known to fit."""
    names = read_names(body.iterfind("{DAV:}prop/*"))
    wanted = (body.findtext(OC + "filter-rules/" + FAVORITE) or "").strip() in TRUE
    about, base = Scattered(cloud, who), find_door(request.path)[1]
    return nc_rows(request, about, base, names, ((place, node) for place, node in cloud.starred(who)
                                                 if wanted and place[:len(path)] == path))


REPORT_KINDS[OC + "filter-files"] = nc_filter
TRUE = ("1", "yes", "true")


def is_favorite(node: Node, about: About) -> bool:
    return is_star(about.dead.get(node.node, {}).get(FAVORITE, ""))


def read_search_time(text: str) -> int:
    """ms of an ISO date, or of seconds since 1970 (Android) or milliseconds."""
    if re.fullmatch(r"\d{1,11}", text):
        return int(text) * SECOND
    return parse_time(text)


SEARCH_VALUES: dict[str, tuple[Callable[[Node, About], Any], Callable[[str], Any]]] = {   # of a node; of a literal
    "displayname": (lambda node, about: node.name.casefold(), str.casefold),
    "getcontenttype": (lambda node, about: node.media or "", str.casefold),
    "getlastmodified": (lambda node, about: node.mtime, read_search_time),
    "metadata-photos-original_date_time": (lambda node, about: node.mtime, read_search_time),           # iOS orders media by it
    "creation_time": (lambda node, about: node.created, read_search_time),
    "creationdate": (lambda node, about: node.created, read_search_time),
    "upload_time": (lambda node, about: node.created, read_search_time),
    "size": (lambda node, about: node.size, parse_size),
    "getcontentlength": (lambda node, about: node.size, parse_size),
    "fileid": (lambda node, about: str(node.node), lambda text: str(read_file_id(text))),
    "favorite": (is_favorite, lambda text: text in TRUE),
}
SEARCH_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "gt": lambda a, b: a > b, "lte": lambda a, b: a <= b,
    "gte": lambda a, b: a >= b, "like": lambda a, b: is_like(str(a), str(b))}


def is_like(text: str, pattern: str) -> bool:
    """Does SQL's LIKE hold, with % for anything?  Linear, whatever the pattern."""
    first, *middle = pattern.split("%")
    if not middle:
        return text == first
    *middle, last = middle
    at, end = len(first), len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last)) or end < at:
        return False
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def read_where(search: ET.Element) -> ET.Element | None:
    """The condition of a search.  raises CloudError too-large for more conditions than any client sends"""
    where = search.find("{DAV:}where/*")
    if where is not None and sum(local_name(part.tag) in (*JUDGES, *SEARCH_OPERATORS, "is-collection") for part in where.iter()) > SEARCH_CONDITIONS:
        raise CloudError("too-large", "a search has at most %d conditions" % SEARCH_CONDITIONS)
    return where


JUDGES: dict[str, Callable[[Iterable[bool]], bool]] = {"and": all, "or": any, "not": lambda found: not all(found)}


def search_test(where: ET.Element) -> Callable[[Node, About], bool]:
    """What a condition of a search asks of a node.  raises CloudError unprocessable for what is not known"""
    kind = local_name(where.tag)
    if kind in JUDGES:
        tests, judge = [search_test(part) for part in where], JUDGES[kind]
        return lambda node, about: judge(test(node, about) for test in tests)
    if kind == "is-collection":
        return lambda node, about: bool(node.kind)
    prop, literal = where.find("{DAV:}prop/*"), (where.findtext("{DAV:}literal") or "").strip()
    if kind not in SEARCH_OPERATORS or prop is None or local_name(prop.tag) not in SEARCH_VALUES:
        raise CloudError("unprocessable", "this cannot be searched for")
    (value, convert), compare = SEARCH_VALUES[local_name(prop.tag)], SEARCH_OPERATORS[kind]
    wanted = literal.casefold() if kind == "like" else convert(literal)
    return lambda node, about: compare(value(node, about), wanted)


def search_nodes(cloud: Cloud, who: Principal, path: tuple[str, ...], where: ET.Element, about: About,
                 alive: Callable[[], None]) -> list[tuple[tuple[str, ...], Node]]:
    """(path, node) of what is found below a path: by an index if a condition has one, else by looking at everything."""
    test = search_test(where)
    for part in where if local_name(where.tag) == "and" else [where]:
        prop = part.find("{DAV:}prop/*")
        lookup = None if prop is None else LOOKUPS.get((local_name(part.tag), local_name(prop.tag)))
        known = lookup(cloud, who, (part.findtext("{DAV:}literal") or "").strip()) if lookup else None
        if known is not None:
            return [(place, node) for place, node in known if place[:len(path)] == path != place and test(node, about)]
    return [(path + place, node) for place, node in cloud.find_all(who, path, lambda node: test(node, about), alive)]


def look_up_name(cloud: Cloud, who: Principal, pattern: str) -> list[tuple[tuple[str, ...], Node]] | None:
    """%words% of a name."""
    before, words, after = pattern.split("%") if pattern.count("%") == 2 else ("", "", "")
    if not words.strip() or before + after:
        return None
    return [(path, node) for path, node, _ in cloud.search(who, Query(parse_words(words)[0], within="names"), limit=SEARCH_MOST)[0]]


def look_up_favorites(cloud: Cloud, who: Principal, value: str) -> list[tuple[tuple[str, ...], Node]] | None:
    return cloud.starred(who) if value in TRUE else None


LOOKUPS: dict[tuple[str, str], Callable[[Cloud, Principal, str], Optional[list[tuple[tuple[str, ...], Node]]]]] = {
    ("like", "displayname"): look_up_name,
    ("eq", "fileid"): lambda cloud, who, value: cloud.by_id(who, read_file_id(value)),
    ("eq", "favorite"): look_up_favorites}
SEARCH_MOST = 5000              # rows of an answer
SEARCH_CONDITIONS = 100         # clients send up to a dozen
ORDERS_MOST = 8                 # by how many properties an answer is sorted


@route("SEARCH", "/remote.php/dav", needs="read", refuse=nc_error)
def nc_search(cloud: Cloud, who: Principal, request: Request) -> Response:
    """basicsearch (RFC 5323), as the phone apps use it for media, favourites, and words of names."""
    body = read_body(request)
    search = None if body is None else body.find("{DAV:}basicsearch")
    href = "" if search is None else (search.findtext("{DAV:}from/{DAV:}scope/{DAV:}href") or "").strip()
    scope, where = list(filter(None, href.split("/"))), None if search is None else read_where(search)
    if scope[:1] != ["files"] or len(scope) < 2 or where is None:
        raise CloudError("bad-request", "search below /files/USER, with a condition")
    owner, *below = map(unquote_name, scope[1:])
    check_owner(who, owner)
    names = tuple(dict.fromkeys(name.replace("{http://nextcloud.com/ns}", OC)                # Android
                                for name in read_names(search.iterfind("{DAV:}select/{DAV:}prop/*"))))
    limit = (search.findtext("{DAV:}limit/{DAV:}nresults") or "").strip()
    most = min(SEARCH_MOST, int(limit)) if re.fullmatch(r"\d{1,6}", limit) else SEARCH_MOST
    about, path = Scattered(cloud, who), check_path(below)
    found = search_nodes(cloud, who, path, where, about, partial(request.check_alive, SEARCH_TIME))
    for order in reversed(search.findall("{DAV:}orderby/{DAV:}order")[:ORDERS_MOST]):
        prop = order.find("{DAV:}prop/*")
        if prop is not None and local_name(prop.tag) in SEARCH_VALUES:
            value = SEARCH_VALUES[local_name(prop.tag)][0]
            found.sort(key=lambda row: value(row[1], about), reverse=order.find("{DAV:}descending") is not None)
    return nc_rows(request, about, NC_FILES.names + (owner,), names, found[:most])


# ---- trash and versions

ROOTS_LACK = ("{DAV:}getetag", OC + "id", OC + "fileid")                # else nc-py-api takes the place itself for one of its things
TRASHED: dict[str, Callable[[Trashed], str]] = {
    NC + "trashbin-filename": lambda item: escape(item.path[-1]),
    NC + "trashbin-original-location": lambda item: escape("/".join(item.path)),
    NC + "trashbin-deletion-time": lambda item: str(item.at // SECOND),
}


def trash_route(method: str, needs: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        route(method, "/remote.php/dav/trashbin/<path>", needs=needs, refuse=nc_error)(for_owner(handler))
        return handler
    return enter


def check_place(path: tuple[str, ...], *first: str) -> None:
    if path[:len(first)] != first:
        raise CloudError("not-found", "there is nothing at this address")


@trash_route("PROPFIND", "read")
def nc_trash(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """What was deleted, each by its id; or what a deleted collection held."""
    check_place(path, "trash")
    names, about = read_propfind(read_body(request))[0] or tuple(TRASHED) + ALLPROP, Scattered(cloud, who)
    if len(path) == 1:
        root, items = cloud.stat(who, ()), cloud.trash(who, limit=PAGE_LIMIT)
        rows = [((str(item.node.node),), item.node, item) for item in items]
    else:
        item = cloud.trashed(who, read_file_id(path[1]))
        root, children = cloud.past(who, item.path + path[2:], item.node.until - 1)
        rows = [((child.name,), child, item._replace(node=child, path=item.path + path[2:] + (child.name,))) for child in children]
    answer, base = Multistatus(names, NC_FILES), request.href(request.path)
    answer.add(base + "/", [None if len(path) == 1 and name in ROOTS_LACK else property_reader(NC_FILES, name)(root, about)
                            for name in names])
    for below, node, item in rows if request["depth"] != "0" else ():
        answer.add(base + format_path(below) + "/" * node.kind, [
            TRASHED[name](item) if name in TRASHED else property_reader(NC_FILES, name)(node, about) for name in names])
    return answer.response()


@trash_route("DELETE", "write")
def nc_purge(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Give up one deleted thing for good, or all."""
    check_place(path, "trash")
    cloud.empty_trash(who, *map(read_file_id, path[1:2]))
    return Response(204)


@trash_route("MOVE", "write")
def nc_restore(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
    """Bring a deleted thing back to where it was; the destination only says that it shall be."""
    check_place(path, "trash")
    cloud.restore(who, read_file_id("".join(path[1:])))
    return Response(201)


def versions_route(method: str, needs: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Enter a handler of (the path of a file, one of its versions or None)."""
    def enter(handler: Callable[..., Response]) -> Callable[..., Response]:
        def find(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...]) -> Response:
            check_place(path, "versions")
            place = cloud.path_of(who, read_file_id("".join(path[1:2])))
            return handler(cloud, who, request, place, parse_id(path[2]) if len(path) == 3 else None)
        route(method, "/remote.php/dav/versions/<path>", needs=needs, refuse=nc_error)(for_owner(find))
        return handler
    return enter


@versions_route("PROPFIND", "read")
def nc_versions(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], rev: int | None) -> Response:
    """The versions of a file before the present one."""
    names = read_propfind(read_body(request))[0] or ALLPROP
    live, about = cloud.stat(who, path), Scattered(cloud, who)
    answer, base = Multistatus(names, NC_FILES), request.href(request.path)
    readers = [property_reader(NC_FILES, name) for name in names]
    root = live._replace(kind=COLLECTION, seq=live.rev)
    answer.add(base + "/", [None if name in ROOTS_LACK else read(root, about) for name, read in zip(names, readers)])
    for version in cloud.versions(who, path)[1:] if request["depth"] != "0" else ():
        node = live._replace(rev=version.rev, size=version.size, mtime=version.mtime, manifest=version.manifest)
        answer.add("%s/%d" % (base, version.rev), [read(node, about) for read in readers])
    return answer.response()


@versions_route("GET", "read")
def nc_version(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], rev: int | None) -> Response:
    """The bytes of a version."""
    return content_response(request, *cloud.version(who, path, rev or 0))


@versions_route("MOVE", "write")
def nc_restore_version(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...], rev: int | None) -> Response:
    """Make a version the present one."""
    cloud.restore_version(who, path, rev or 0)
    return Response(201)


# ==== 13. Web pages ======================================================================
#
# The page is one more client of the JSON API: PAGE_HTML, PAGE_STYLE and PAGE_SCRIPT are joined once, and nothing else is
# loaded.  Names and other users' text enter it by textContent alone (W5).

PAGE_STYLE = r"""
:root {
  color-scheme: light;
  --back: #fff; --side: #f5f6f8; --raised: #fff; --text: #1b1e23; --soft: #59626e; --line: #e2e5ea; --hover: #f1f3f6;
  --accent: #1857c4; --on-accent: #fff; --chosen: #e4edfb; --danger: #b3261e; --shadow: 0 8px 28px rgb(20 30 50 / .18);
  --icon: #7a8696;
  --mark: #fff3c4; --star: #a66a00;
}
:root[data-theme=dark] {
  color-scheme: dark;
  --back: #15171b; --side: #1b1e23; --raised: #22262c; --text: #e8eaee; --soft: #a4adb9; --line: #2e333b;
  --hover: #20242a;
  --accent: #8fb8ff; --on-accent: #0d1b33; --chosen: #22344f; --danger: #ff9d94; --shadow: 0 8px 28px rgb(0 0 0 / .6);
  --icon: #8f9bab;
  --mark: #4d431f; --star: #e0b04a;
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { scrollbar-gutter: stable; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 0 0 .5rem; }
p { margin: 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
:focus:not(:focus-visible) { outline: none; }
.soft, .hint { color: var(--soft); }
.problem { color: var(--danger); }
.problem:empty, .queue .soft:empty { display: none; }

button, .button { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: 8px; padding: .4rem .85rem; min-height: 36px; cursor: pointer; white-space: nowrap;
  display: inline-flex; align-items: center; justify-content: center; gap: .4rem; }
button:hover, .button:hover { background: var(--hover); text-decoration: none; }
button:disabled { opacity: .5; cursor: default; }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button.primary:hover { filter: brightness(1.08); }
button.danger { color: var(--danger); border-color: currentColor; }
button.quiet { background: none; border-color: transparent; color: var(--soft); }
button.quiet:hover { background: var(--hover); color: var(--text); }
input, select, textarea { font: inherit; color: inherit; background: var(--back); border: 1px solid var(--soft);
  border-radius: 8px; padding: .45rem .7rem; min-height: 40px; width: 100%; }
input[type=checkbox] { width: 18px; height: 18px; min-height: 0; margin: 0; padding: 0; accent-color: var(--accent);
  flex: none; }
label.field { display: grid; gap: .25rem; }
label.field span { font-weight: 500; }
label.tick { display: flex; gap: .6rem; align-items: center; min-height: 36px; }
kbd { font: inherit; font-size: .85em; color: var(--soft); }
progress, meter { width: 100%; height: 6px; }
progress { appearance: none; border: 0; border-radius: 3px; background: var(--line); overflow: hidden; }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
.icon { width: 24px; height: 24px; flex: none; fill: none; stroke: var(--icon); stroke-width: 1.5;
  stroke-linecap: round; stroke-linejoin: round; }
.icon.collection .body { fill: var(--accent); stroke: none; opacity: .85; }
.icon.image, .icon.video { stroke: #9a5bb5; }
.icon.pdf { stroke: #c4453c; }
.icon.table { stroke: #2e8b57; }

/* the entrance */
.gate { max-width: 24rem; margin: auto; padding: 12vh 1.25rem 4rem; display: grid; gap: 1rem; }
.gate form { display: grid; gap: 1rem; }
.gate .primary { min-height: 44px; }
.brand { display: flex; align-items: center; gap: .55rem; font-weight: 650; font-size: 1.05rem; color: var(--text); }
.brand:hover { text-decoration: none; }
.choices { display: flex; flex-wrap: wrap; gap: .25rem; }
.choices button[aria-pressed=true] { color: var(--text); font-weight: 600; }
.settings .choices button[aria-pressed=true] { background: var(--chosen); }

/* the frame */
#app { min-height: 100vh; }
body:has(.side) #app { display: grid; grid-template-columns: 14.5rem minmax(0, 1fr); }
.unseen { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; z-index: 9; background: var(--raised); padding: .5rem 1rem; }
.side { background: var(--side); border-right: 1px solid var(--line); padding: 1.1rem 1rem; display: flex;
  flex-direction: column; gap: 1.1rem; position: sticky; top: 0; height: 100vh; }
.side nav { display: grid; gap: 2px; }
.side nav a { color: var(--text); padding: .5rem .75rem; border-radius: 8px; min-height: 38px; }
.side nav a:hover { background: var(--hover); text-decoration: none; }
.side nav a[aria-current] { background: var(--chosen); font-weight: 600; }
.new { min-height: 44px; }
.quota { margin-top: auto; display: grid; gap: .35rem; color: var(--soft); font-size: .875rem; }
main { min-width: 0; padding: 0 1.75rem 6rem; }
main:focus { outline: none; }
.top { display: flex; gap: 1.5rem; align-items: center; min-height: 68px; position: sticky; top: 0;
  background: var(--back); z-index: 3; }
.crumbs { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem .35rem; flex: 1; min-width: 0;
  font-size: 1.1rem; }
.crumbs a, .crumbs > span { color: var(--soft); padding: .3rem .35rem; border-radius: 6px; overflow-wrap: anywhere; }
.crumbs [aria-current] { color: var(--text); font-weight: 600; }
.crumbs .slash { padding: 0; }
.search { width: 17rem; flex: none; }
.search input { background: var(--side); border-color: var(--side); }
.search input:hover { border-color: var(--line); }
.search input::placeholder { color: var(--soft); opacity: 1; }
.bar { display: flex; gap: .4rem; align-items: center; min-height: 52px; position: sticky; top: 68px;
  background: var(--back); z-index: 3; padding-bottom: .4rem; }
.bar .count { margin-right: auto; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.selecting .bar .count { margin-right: .6rem; color: var(--text); flex: none; }
.bar button { padding: .3rem .7rem; }
.bar:empty { display: none; }
.tab { padding: .5rem .8rem; border-radius: 8px; color: var(--soft); min-height: 38px; }
.tab[aria-current] { color: var(--text); font-weight: 600; background: var(--side); }
.hint { padding-bottom: .8rem; font-size: .925rem; }

/* the list */
.grid:focus-visible { outline: none; }
.cells { display: grid; grid-template-columns: 40px minmax(0, 1fr) 8.5rem 6rem 44px; align-items: center; }
.head { border-bottom: 1px solid var(--line); color: var(--soft); font-size: .875rem; }
.head button { background: none; border: 0; padding: .3rem 0; min-height: 34px; color: inherit; }
.head button:hover { color: var(--text); }
[aria-sort=ascending] button::after { content: "↑"; }
[aria-sort=descending] button::after { content: "↓"; }
.check { display: grid; place-items: center; }
.size { text-align: right; padding-right: .75rem; font-variant-numeric: tabular-nums; }
.rows { position: relative; min-height: 44px; }
.row { position: absolute; left: 0; right: 0; top: 0; height: 44px; border-bottom: 1px solid var(--line);
  user-select: none; -webkit-touch-callout: none; -webkit-tap-highlight-color: transparent; }
.row:hover { background: var(--hover); }
.row[aria-selected=true] { background: var(--chosen); }
.grid:focus-visible .cursor { outline: 2px solid var(--accent); outline-offset: -2px; border-radius: 6px; }
.row.cut { opacity: .55; }
.row.over, .crumbs .over { background: var(--chosen); box-shadow: inset 0 0 0 2px var(--accent); border-radius: 6px; }
.row .mtime, .row .deleted, .row .size { color: var(--soft); font-size: .9rem; }
.row .name { display: flex; align-items: center; gap: .75rem; min-width: 0; }
.names { min-width: 0; flex: 1; }
.label { color: var(--text); display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  width: fit-content; max-width: 100%; }
.second { display: none; color: var(--soft); font-size: .85rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.second.where { display: block; font-size: .8rem; line-height: 1.25; }
.where .small { display: none; }
.filters ~ .grid:not(.tiles) .row { height: 66px; }
.snippet { font-size: .8rem; line-height: 1.35; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.tiles .snippet { display: none; }
mark { background: var(--mark); color: var(--text); }
.filters { display: flex; flex-wrap: wrap; gap: .4rem; padding-bottom: .6rem; }
.filters select { width: auto; max-width: 14rem; min-height: 38px; padding: .2rem .4rem; }
.hint:empty { display: none; }
.names:has(.where) .label { line-height: 1.3; }
.more button { background: none; border: 0; width: 40px; padding: 0; color: var(--soft); opacity: 0; font-weight: 700; }
.row:hover .more button, .row.cursor .more button, .row[aria-selected=true] .more button { opacity: 1; }
.renaming { flex: 1; position: relative; }
.rename { min-height: 32px; padding: .2rem .5rem; }
.renaming .problem { position: absolute; top: 100%; z-index: 4; background: var(--raised); border-radius: 8px;
  padding: .3rem .6rem; box-shadow: var(--shadow); font-size: .9rem; }
.band { position: absolute; border: 1px solid var(--accent);
  background: color-mix(in srgb, var(--accent) 15%, transparent); z-index: 4; pointer-events: none; }
.banding { user-select: none; }
.dropping main::after { content: attr(data-drop); position: fixed; inset: 6px 6px 6px 15rem; z-index: 6;
  border: 3px solid var(--accent); border-radius: 10px; display: grid; place-items: end center; padding: 2rem;
  font-weight: 600; pointer-events: none; background: color-mix(in srgb, var(--accent) 8%, transparent); }
.ghost { position: absolute; top: -9rem; background: var(--accent); color: var(--on-accent); padding: .4rem .9rem;
  border-radius: 8px; }
.empty { text-align: center; padding: 14vh 1rem; color: var(--soft); display: grid; gap: .4rem; justify-items: center; }
.big { font-size: 1.2rem; color: var(--text); text-align: center; }

.star { width: 18px; height: 18px; flex: none; margin-right: .75rem; fill: var(--star); }

/* tiles */
.tiles .head { display: none; }
.tiles .row { right: auto; height: 176px; border: 0; padding: 6px; display: block; border-radius: 10px; }
.tiles .row .name { flex-direction: column; gap: .35rem; align-items: stretch; height: 100%; }
.tiles .row > .mtime, .tiles .row > .size, .tiles .row > .deleted { display: none; }
.tiles .names { flex: none; padding: 0 .3rem; }
.tiles .label { margin: 0 auto; font-size: .9rem; }
.tiles .star { position: absolute; left: 16px; bottom: 52px; stroke: var(--back); stroke-width: 2;
  paint-order: stroke; }
.tiles .check { position: absolute; left: 14px; top: 14px; opacity: 0; z-index: 1; }
.tiles .more button { background: var(--raised); border-radius: 8px; }
.tiles .more { position: absolute; right: 8px; top: 8px; z-index: 1; }
.tiles .row:hover .check, .tiles .row[aria-selected=true] .check, .tiles .cursor .check { opacity: 1; }
.picture { flex: 1; min-height: 0; display: grid; place-items: center; background: var(--side); border-radius: 8px;
  overflow: hidden; }
.picture img { width: 100%; height: 100%; object-fit: cover; }
.video::after { content: "▶"; position: absolute; background: rgb(0 0 0 / .6); color: #fff; border-radius: 99px;
  padding: .3rem .6rem; }
.picture .icon { width: 52px; height: 52px; stroke-width: 1; }

.slider, .limits { display: flex; flex-wrap: wrap; gap: .8rem; align-items: center; padding-bottom: 1rem; }
.slider input, .limits select { width: auto; }
.limits select { max-width: 14rem; min-height: 38px; padding: .2rem .4rem; }
.limits input { min-height: 38px; }
.row .tag { margin-right: .75rem; }
.limits label { color: var(--soft); display: flex; gap: .5rem; align-items: center; }
.changes { max-width: 60rem; padding-bottom: 1rem; }
.changes summary { cursor: pointer; padding: .4rem 0; }
.days h2 { margin: 1.5rem 0 0; }
.days a { text-decoration: underline; }
.slider [type=range] { flex: 1; min-width: 8rem; padding: 0; accent-color: var(--accent); }
.slider output { min-width: 12rem; font-weight: 600; }

/* steps: versions, activity, devices */
.steps { list-style: none; margin: 0; padding: 0; max-width: 60rem; }
.steps li { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; padding: .75rem 0;
  border-bottom: 1px solid var(--line); }
.steps .what { flex: 1; min-width: 13rem; overflow-wrap: anywhere; }
.acts { display: flex; gap: .4rem; flex-wrap: wrap; }
.tag { display: inline-block; background: var(--chosen); border-radius: 6px; padding: 0 .5rem; margin-left: .5rem;
  font-size: .85rem; }
.wide { width: 100%; max-width: 60rem; margin-top: 1rem; }
.settings { display: grid; gap: 2rem; max-width: 46rem; padding-top: .5rem; }
.settings section { display: grid; gap: .6rem; }
.buttons { display: flex; gap: .5rem; flex-wrap: wrap; justify-content: flex-end; }
.settings .keys { max-height: none; padding: 0; }
.settings .buttons select { width: auto; }
.settings .buttons { justify-content: flex-start; align-items: end; }

.command { display: flex; gap: .5rem; align-items: start; }
.command code { flex: 1; text-align: left; background: var(--side); border-radius: 8px; padding: .5rem .75rem;
  font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; min-width: 0; }
.ways { display: grid; gap: 1.1rem; }
.ways h3 { font-size: 1rem; margin: 0 0 .3rem; }
.qr { width: 190px; height: 190px; background: #fff; border-radius: 8px; }
[aria-busy=true] { opacity: .5; pointer-events: none; cursor: progress; }
.banners { padding-top: 0; }
.banner { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; background: var(--mark);
  border-radius: 10px; padding: .7rem 1rem; margin-top: .8rem; }
.banner span { flex: 1; min-width: 14rem; }

/* sheets and menus */
dialog { color: var(--text); background: var(--raised); border: 1px solid var(--line); border-radius: 14px; padding: 0;
  box-shadow: var(--shadow); }
dialog::backdrop { background: rgb(10 14 20 / .45); }
.sheet .inside { padding: 1.4rem; display: grid; gap: 1rem; width: min(30rem, 92vw); }
.sheet h2 { margin: 0; overflow-wrap: anywhere; }
.sheet form { display: grid; gap: 1rem; }
.walk { border: 1px solid var(--line); border-radius: 8px; height: 40vh; overflow: auto; padding: .3rem; }
.walk .soft { padding: 1rem; text-align: center; }
.item { width: 100%; justify-content: flex-start; background: none; border: 0; border-radius: 6px; gap: .7rem;
  font-weight: 400; }
.item kbd { margin-left: auto; padding-left: 1.5rem; }
.item[aria-checked=true]::after { content: "✓"; margin-left: auto; color: var(--accent); }
.walk .item { overflow: hidden; }
.walk .buttons button:first-child { margin-right: auto; }
.sheet.menu { position: fixed; inset: auto; margin: 0; border-radius: 10px; min-width: 13rem; width: max-content; }
.item:focus-visible { outline-offset: -2px; }
.sheet.menu .inside { padding: .35rem; width: auto; }
.sheet.menu::backdrop { background: none; }
.items, .walk { display: grid; align-content: start; }
.items hr { border: 0; border-top: 1px solid var(--line); margin: .3rem; }
.way { display: grid; gap: .6rem; }
.renames { list-style: none; margin: 0; padding: 0; height: 28vh; overflow: auto; border-top: 1px solid var(--line); }
.renames li { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; padding: .35rem 0; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--line); }
.keys { margin: 0; max-height: 60vh; overflow: auto; padding-right: 1rem; }
.keys div { display: flex; justify-content: space-between; gap: 1rem; padding: .35rem 0;
  border-bottom: 1px solid var(--line); }
.keys dd { margin: 0; }
.shares dd { width: 11rem; text-align: right; }

/* toasts and the upload queue */
.toasts { position: fixed; left: 50%; transform: translateX(-50%); bottom: 1.4rem; z-index: 8; display: grid;
  gap: .5rem; width: max-content; max-width: min(92vw, 40rem); }
.toast { display: flex; align-items: center; gap: .4rem; background: #24292f; color: #f4f6f8; border-radius: 10px;
  padding: .45rem .5rem .45rem 1rem; box-shadow: var(--shadow); }
.toast span { flex: 1; overflow-wrap: anywhere; padding: .25rem .6rem .25rem 0; }
.toast button { background: none; border: 0; color: #9cc3ff; font-weight: 600; }
.toast button.quiet { color: #b9c2cc; font-weight: 400; }
.toast button:hover { background: rgb(255 255 255 / .12); color: #fff; }
.toast.bad { background: #8c1d18; }
.toast.bad button.quiet { color: #ffd9d6; }
.queue { position: fixed; right: 1.2rem; bottom: 1.2rem; width: 24rem; max-width: calc(100vw - 2rem);
  background: var(--raised); border: 1px solid var(--line); border-radius: 12px; box-shadow: var(--shadow); z-index: 5;
  overflow: hidden; }
.queue .title { display: flex; flex-wrap: wrap; align-items: center; padding: .5rem .5rem .5rem 1rem; }
.queue strong { flex: 1 1 8rem; text-wrap: balance; font-weight: 600; font-variant-numeric: tabular-nums; }
.queue > progress { display: block; border-radius: 0; height: 4px; }
.queue ul { list-style: none; margin: 0; padding: 0; max-height: 15rem; overflow: auto; }
.queue li { display: grid; grid-template-columns: minmax(0, 1fr) auto auto; gap: 0 .6rem; align-items: center;
  padding: .25rem .5rem .4rem 1rem; border-top: 1px solid var(--line); min-height: 46px; }
.queue li bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.queue li progress { grid-column: 1 / -1; height: 3px; }
.queue li:not(.sending) progress { display: none; }
.queue .state { color: var(--soft); font-size: .85rem; }
.queue .title .soft { flex: 1 0 100%; font-size: .85rem; padding-bottom: .2rem; }
.queue .failed { grid-template-columns: minmax(0, 1fr) auto; }
.queue .failed .state { grid-row: 2; grid-column: 1 / -1; color: var(--danger); }
.queue .broken .state { grid-column: 1 / -1; }

/* preview */
dialog.preview { width: 100vw; height: 100vh; height: 100dvh; max-width: none; max-height: none; border: 0;
  border-radius: 0; background: var(--back); }
.preview[open] { display: flex; flex-direction: column; }
.preview .title { display: flex; align-items: center; gap: .5rem; padding: .6rem 1rem;
  border-bottom: 1px solid var(--line); }
.preview .title strong { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.preview .title .soft { margin-right: auto; white-space: nowrap; }
.preview .body, .preview .stage { display: grid; grid-template: minmax(0, 1fr) / minmax(0, 1fr); place-items: center; }
.preview .body { flex: 1; min-height: 0; overflow: auto; position: relative; }
.note { background: var(--mark); padding: .5rem 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem;
  align-items: center; }
.note:empty { display: none; }
.pages { width: 100%; height: 100%; overflow: auto; display: grid; align-content: start; justify-items: center; }
.pages .note { width: 100%; }
.preview img, .preview video { max-width: 100%; max-height: 100%; }
.preview pre, .diff { width: min(100%, 70rem); align-self: start; margin: 0; padding: 1.5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .875rem/1.55 ui-monospace, monospace; }

.preview .stage { width: 100%; height: 100%; overflow: auto; }
.preview .zoomed { place-items: start; cursor: grab; }
.preview .zoomed img { max-width: none; max-height: none; }
.preview .stage:not(.zoomed) img { cursor: zoom-in; }
.preview iframe { border: 0; width: 100%; height: 100%; background: #fff; }
.preview textarea { width: 100%; height: 100%; border: 0; border-radius: 0;
  padding: 1.25rem max(1.25rem, calc(50% - 34rem)); resize: none; tab-size: 4;
  font: .9rem/1.55 ui-monospace, monospace; }
.preview textarea:focus-visible { outline-offset: -2px; }
.preview audio { width: min(92%, 40rem); }
.preview .stage:not(.zoomed) { touch-action: pan-y pinch-zoom; }
.foot { display: flex; gap: .75rem; align-items: center; justify-content: center; padding: .4rem 1rem;
  border-top: 1px solid var(--line); }
.foot button:first-child { margin-right: auto; }
.foot button:last-child { margin-left: auto; }
.preview .toasts { bottom: 4.5rem; }
.showing .title, .showing .foot { position: absolute; opacity: 0; }
.preview.showing { background: #000; }
.paper { width: min(100%, 50rem); align-self: start; padding: 1.5rem; overflow-wrap: anywhere; }
.paper > * + * { margin-top: .8rem; }
.paper h1, .paper h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.paper :is(pre, code) { background: var(--side); border-radius: 6px; font: .875rem/1.5 ui-monospace, monospace; }
.paper a { text-decoration: underline; }
.paper code { padding: .1rem .35rem; }
.paper pre { padding: .8rem 1rem; overflow-x: auto; white-space: pre; width: auto; }
.paper pre code { padding: 0; }
.paper img { max-width: 100%; }
.paper blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft); }
.paper :is(ul, ol) { padding-left: 1.6rem; }
.paper li:has(> input) { list-style: none; margin-left: -1.5rem; }
.paper input { display: inline-block; vertical-align: -3px; margin-right: .4rem; }
.paper input + p { display: inline; }
.paper hr { border: 0; border-top: 1px solid var(--line); }
table { border-collapse: collapse; align-self: start; }
.preview .sheetful { width: 100%; height: 100%; overflow: auto; }
th, td { border: 1px solid var(--line); padding: .3rem .7rem; text-align: left; overflow-wrap: anywhere; }
th { background: var(--side); position: sticky; top: 0; }
.versions .steps a:not(.button) { font-weight: 600; }
.versions .steps li { padding: .75rem; }
.versions li:has([aria-current]) { background: var(--chosen); border-radius: 8px; }
.look { border: 1px solid var(--line); border-radius: 12px; overflow: hidden; scroll-margin-top: 60px;
  margin-top: 1rem; }
.look nav { display: flex; flex-wrap: wrap; padding: .4rem; border-bottom: 1px solid var(--line); }
.look iframe { min-height: 70vh; }
@media (min-width: 64rem) {
  .versions { display: grid; grid-template-columns: minmax(20rem, 2fr) 3fr; gap: 2rem; }
  .look { display: flex; flex-direction: column; position: sticky; top: 7.6rem; height: calc(100vh - 9rem); margin: 0; }
}
.diff :is(ins, del) { display: block; text-decoration: none; background: color-mix(in srgb, #2e8b57 20%, transparent); }
.diff del { background: color-mix(in srgb, #c4453c 20%, transparent); }
.diff summary { color: var(--soft); padding: .5rem 0; cursor: pointer; }
.readme { margin-top: 2rem; border: 1px solid var(--line); border-radius: 12px; }
.readme:empty { display: none; }

/* a phone */
@media (max-width: 45rem) {
  button, .button, .tab, .side nav a { min-height: 44px; }
  body:has(.side) #app { display: block; }
  .side { position: fixed; inset: auto 0 0 0; height: auto; flex-direction: row;
    padding: 0 0 env(safe-area-inset-bottom); border: 0; border-top: 1px solid var(--line); z-index: 4; gap: 0; }
  .side .brand, .quota { display: none; }
  .side nav { display: flex; flex: 1; order: -1; }
  .side nav a { flex: auto; text-align: center; padding: .9rem .1rem; border-radius: 0; font-size: min(.8rem, 3.3vw);
    min-height: 52px; }
  .side nav a[aria-current] { background: none; color: var(--accent); }
  .new { position: fixed; right: 1rem; bottom: calc(68px + env(safe-area-inset-bottom)); border-radius: 99px;
    padding: .6rem 1.4rem; box-shadow: var(--shadow); min-height: 48px; }
  main { padding: 0 .75rem 9rem; }
  .top { flex-direction: column-reverse; align-items: stretch; gap: .2rem; position: static; padding-top: .6rem;
    min-height: 0; }
  .search { width: 100%; }
  .search input { min-height: 44px; }
  .crumbs a, .crumbs > span { min-height: 44px; display: flex; align-items: center; }
  .crumbs .slash { min-height: 0; }
  .bar { top: 0; flex-wrap: wrap; }
  .bar:has(.tab) { gap: 0; }
  .tab { padding: .65rem .4rem; font-size: min(1rem, 3.7vw); }
  .selecting .content { padding-top: 52px; }
  .selecting .bar button:not(.prime):not(.quiet), .selecting .new, body:not([data-view=files]) .new { display: none; }
  .selecting .bar { position: fixed; inset: auto 0 0 0; z-index: 5; background: var(--side);
    border-top: 1px solid var(--line); padding: .3rem .75rem calc(.6rem + env(safe-area-inset-bottom)); }
  .selecting .bar .quiet { order: 1; }
  .selecting .bar .count { flex: 1 0 60%; margin: 0; }
  .selecting .bar .prime { order: 2; flex: 1; }
  .head { display: none; }
  .cells { grid-template-columns: 4px minmax(0, 1fr) 44px; }
  .check { visibility: hidden; }
  .selecting .cells { grid-template-columns: 44px minmax(0, 1fr) 44px; }
  .selecting .check { visibility: visible; }
  .preview .title { flex-wrap: wrap; }
  .slider output { flex: 1 0 100%; }
  .slider [type=datetime-local], .limits > select { flex: 1; min-width: 8.5rem; max-width: none; }
  .limits > label { flex: 1; min-width: 10rem; }
  .limits label { display: grid; gap: 0; }
  .preview .title strong { flex: 1 0 55%; }
  .preview .title button:not(.primary) { order: 1; }
  .preview .title .soft { display: none; }
  .preview .title button { padding: .4rem .6rem; }
  .row { height: 60px; }
  .row > .mtime, .row > .size, .row > .deleted { display: none; }
  .filters ~ .grid:not(.tiles) .row { height: 82px; }
  .filters select { flex: 1 1 40%; max-width: none; min-height: 44px; }
  .second, .second.where { display: block; font-size: .85rem; }
  .where .small { display: inline; }
  .more button { opacity: 1; width: 44px; height: 44px; }
  .tiles .second { display: none; }
  .tiles .more button { background: color-mix(in srgb, var(--raised) 60%, transparent); border-radius: 50%; width: 32px;
    height: 32px; min-height: 0; margin: 0 6px; }
  .sheet { margin: auto 0 0; width: 100%; max-width: 100%; border-radius: 16px 16px 0 0; }
  .sheet .inside, .sheet.menu .inside { width: 100%; padding-bottom: calc(1rem + env(safe-area-inset-bottom)); }
  .sheet.menu { inset: auto 0 0 0; width: 100%; }
  .sheet.menu::backdrop { background: rgb(10 14 20 / .45); }
  .item { min-height: 48px; }
  .toasts { bottom: calc(64px + env(safe-area-inset-bottom)); width: 94vw; }
  .queue { right: .5rem; left: .5rem; width: auto; max-width: none; bottom: calc(60px + env(safe-area-inset-bottom)); }
  .queue ul { max-height: 7.5rem; }
}
@media (prefers-reduced-motion: no-preference) {
  .toast, .sheet { animation: rise .14s ease-out; }
  .showing img { animation: rise 1s; }
}
@keyframes rise { from { opacity: 0; translate: 0 8px; } }
"""

PAGE_SCRIPT = r"""
"use strict";

// ---- where the page lives: a proxy may serve it below a path of its own

const VIEW = /^(.*?)(?:\/(?:files|starred|past|versions|trash|activity|search|settings|setup|login)(?:\/.*)?|\/)$/;
const PREFIX = (location.pathname.match(VIEW) || ["", ""])[1];
const encodePath = path => path.split("/").map(encodeURIComponent).join("/");
const decodePath = path => path.split("/").filter(Boolean).map(decodeURIComponent).join("/");
const parentOf = path => path.slice(0, Math.max(0, path.lastIndexOf("/")));
const nameOf = path => path.slice(path.lastIndexOf("/") + 1);
const join = (path, name) => path ? path + "/" + name : name;
const addressOf = path => PREFIX + "/files" + (path && "/" + encodePath(path));
const apiAddress = (what, path, values = {}) =>
  PREFIX + "/api/v1/" + what + (path === undefined ? "" : "/" + encodePath(path)) + queryOf(values);
const contentAddress = (entry, values) =>          // entry.as: which version of it, if not the present one
  apiAddress("content", entry.path, values || entry.as || (view.at ? {at: view.at} : {}));

function queryOf(values) {
  const pairs = Object.entries(values).filter(([, value]) => value || value === 0)
    .flatMap(([name, value]) => [].concat(value).map(one => name + "=" + encodeURIComponent(one)));
  return pairs.length ? "?" + pairs.join("&") : "";
}

// ---- elements

// h("a.name.wide", {href: "/", onclick: go}, "text", [children]): strings become text nodes, never markup
function h(tag, about = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(about)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (DEFAULTS[key] in element) element[DEFAULTS[key]] = value;
    else if (/^(title|alt|aria-label)$/.test(key)) element.setAttribute(key, plain(value));
    else if (key in element && !/^(role|list|form|width|height)$/.test(key)) element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  const isPart = child => child !== null && child !== undefined && child !== false;
  element.append(...children.flat(9).filter(isPart).map(plain));
  return element;
}

// signs that are not seen, though they change how others are read, are named: ‹U+202E›.  What files say is raw
const UNSEEN = /[\u00ad\u061c\u0080-\u009f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const nameSign = sign => "‹U+" + sign.charCodeAt().toString(16).toUpperCase().padStart(4, "0") + "›";
const plain = text => typeof text === "string" ? text.replace(UNSEEN, nameSign) : text;
const raw = text => document.createTextNode(text);

// what a field holds by itself, so that isTyped() knows it from what somebody typed
const DEFAULTS = {value: "defaultValue", checked: "defaultChecked"};

function svg(name, about, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(about)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const button = (label, run, about = {}) => h("button", {type: "button", onclick: run, ...about}, label);
const link = (label, address, about = {}) => h("a", {href: address, ...about}, label);
const field = (label, about) => h("label.field", {}, h("span", {}, label), h("input", {required: true, ...about}));
const tick = (label, about) => h("label.tick", {}, h("input", {type: "checkbox", ...about}), label);
// rows: {value: words}
const choice = (label, name, rows, value, about) => h("select", {name, "aria-label": t(label), ...about},
  Object.entries(rows).map(([key, words]) => h("option", {value: key, selected: key === value}, t(words))));
const find = (selector, within = document) => within.querySelector(selector);
const isPhone = matchMedia("(max-width: 45rem)");

// ---- icons: one per kind of thing, drawn in 24 x 24

const SHEET = "M6 2h8l5 5v13a2 2 0 0 1-2 2H6a2 2 0 0 1-2-2V4a2 2 0 0 1 2-2z";
const ICONS = {
  collection: "M3 5a2 2 0 0 1 2-2h4.6l2 2.5H19a2 2 0 0 1 2 2V18a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2z",
  text: SHEET + "|M8 11h7M8 14h7M8 17h4",
  document: SHEET + "|M8 8h2M8 11h7M8 14h7M8 17h7",
  image: SHEET + "|M6.5 18l3.5-5 2.5 3 1.5-2 2.5 4M9 9.5h.01",
  video: SHEET + "|M9 11l5.5 3.2L9 17.5z",
  audio: SHEET + "|M9 17.5v-6l5-1v6",
  pdf: SHEET + "|M8 17.5v-5h2a1.5 1.5 0 0 1 0 3H8M13 12.500v5h1a2 2 0 0 0 2-2v-1a2 2 0 0 0-2-2z",
  archive: SHEET + "|M10 4h2M11 7h2M10 10h2M11 13h2v4h-2z",
  table: SHEET + "|M7 11h9M7 14h9M7 17h9M10 11v6.500"
};
const STAR = "M12 3l3 6 6 1-4 4 1 7-6-3-6 3 1-7-4-4 6-1z";
const categoryOf = entry => entry.kind === "collection" ? "collection" : entry.category || "other";

function icon(kind) {
  const [body, detail] = (ICONS[kind] || SHEET).split("|");
  const drawing = svg(
    "svg",
    {viewBox: "0 0 24 24", class: "icon " + kind, "aria-hidden": "true"},
    svg("path", {d: body, class: "body"})
  );
  if (detail) drawing.append(svg("path", {d: detail, class: "detail"}));
  return drawing;
}

// ---- words, numbers, times

const LANGUAGES = {en: "English", de: "Deutsch"};
let language = localStorage.getItem("language") || navigator.language.slice(0, 2);
let words = {}, number, dates, sizes;

// English stands where it is used; what it is in another language is a table that the server keeps
async function setLanguage(name) {
  language = name in LANGUAGES ? name : "en";
  words = language === "en" ? {}
    : await fetch(PREFIX + "/words/" + language).then(answer => answer.json()).catch(() => ({}));
  document.documentElement.lang = language;
  number = new Intl.NumberFormat(language);
  sizes = new Intl.NumberFormat(language, {maximumFractionDigits: 1});
  const make = how => new Intl.DateTimeFormat(language, how);
  dates = {
    time: make({hour: "2-digit", minute: "2-digit"}),
    day: make({day: "numeric", month: "short"}),
    year: make({day: "numeric", month: "short", year: "numeric"}),
    date: make({dateStyle: "full"}),
    full: make({dateStyle: "full", timeStyle: "medium"}),
    long: make({dateStyle: "medium", timeStyle: "short"})
  };
}

// t("{n} files", {n: 3}); the English text is the key
function t(text, values) {
  const said = words[text] || text;
  return values ? said.replace(/\{(\w+)\}/g, (whole, name) => name in values
    ? typeof values[name] === "number" ? number.format(values[name]) : values[name] : whole) : said;
}

const quoted = name => t("“{name}”", {name});
const DAY = 864e5;
const plural = (n, one, many, values) => t(n === 1 ? one : many, {n, ...values});

function formatSize(bytes) {
  if (bytes < 1024) return t("{n} B", {n: bytes});
  const power = Math.min(5, Math.floor(Math.log2(bytes) / 10));
  return sizes.format(bytes / 1024 ** power) + " " + ["", "KB", "MB", "GB", "TB", "PB"][power];
}

function formatTime(text) {
  const then = new Date(text), now = new Date();
  if (then.toDateString() === now.toDateString()) return dates.time.format(then);
  return (then.getFullYear() === now.getFullYear() ? dates.day : dates.year).format(then);
}

const longTime = at => dates.long.format(new Date(at));
const dotted = (...parts) => parts.filter(Boolean).join(" · ");
const timeElement = text => h("time", {dateTime: text, title: dates.full.format(new Date(text))}, formatTime(text));

// ---- light and dark: as the system says, or as the reader chose

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const chosen = localStorage.getItem("theme");
  document.documentElement.dataset.theme = chosen || (darkSystem.matches ? "dark" : "light");
}

function chooseTheme(name) {
  name ? localStorage.setItem("theme", name) : localStorage.removeItem("theme");
  applyTheme();
  show();
}

const choices = (rows, chosen, choose) => h("div.choices", {}, Object.entries(rows).map(([value, label]) =>
  button(label, () => choose(value),
    {className: "quiet", lang: rows === LANGUAGES && value, "aria-pressed": String(value === chosen)})));
const themeButtons = () => choices({"": t("Like the system"), light: t("Light"), dark: t("Dark")},
  localStorage.getItem("theme") || "", chooseTheme);

// ---- the server

class Problem extends Error {
  constructor(status, about) {
    super(about.detail || about.code);
    Object.assign(this, {status, code: about.code, about});
  }
}

const unless = code => error => { if (error.code !== code) throw error; };
const trouble = (code, detail) => new Problem(0, {code, detail});

const PROBLEMS = {
  network: "The server cannot be reached. Check the connection and try again.",
  "unauthenticated": "Wrong name or password.",
  "forbidden": "This is not allowed.",
  "not-found": "This is not there any more.",
  "gone": "That is too long ago: the history does not reach back so far.",
  "exists": "There is something of that name already.",
  "precondition-failed": "Somebody changed this in the meantime.",
  "same-place": "One of these lies in the other.",
  "locked": "Another program has this file locked at the moment.",
  "over-quota": "Your storage is full. Delete something, then empty the trash, or ask for more.",
  "disk-full": "The disk of the server is almost full; it takes nothing new until there is room.",
  "too-large": "This file is larger than the server accepts.",
  "busy": "The server is busy. Try again in a moment.",
  "read-only": "The server cannot write at the moment.",
  "storage-failed": "The server could not read all of it. Whoever runs it should look at its log.",
  "internal": "Something went wrong on the server. Whoever runs it should look at its log.",
  "not-set-up": "This server is not set up yet. Open the link that it printed when it started.",
};
Object.assign(PROBLEMS, {twin: PROBLEMS.exists, "lock-conflict": PROBLEMS.locked});

const waitWords = seconds => seconds < 99 ? plural(seconds, "{n} second", "{n} seconds")
  : plural(Math.ceil(seconds / 60), "{n} minute", "{n} minutes");
const explain = error => error.code === "throttled"
  ? t("Too many tries. Wait {time}, then try again.", {time: waitWords(error.wait)}) : error instanceof Problem
  ? t(PROBLEMS[error.code] || error.message) + (error.about.request ? " (" + error.about.request + ")" : "")
    : String(error);
const HEADERS = {"X-Requested-By": "page"};

// api("POST", "move", {items}) or api("GET", "files/a%20b", {limit: 5}); throws Problem
async function api(method, what, values = {}, headers = {}) {
  const inQuery = method !== "POST" && method !== "PATCH";
  const answer = await ask(PREFIX + "/api/v1/" + what + (inQuery ? queryOf(values) : ""), {
    method, headers: {...HEADERS, ...headers, ...(inQuery ? {} : {"Content-Type": "application/json"})},
    body: inQuery ? undefined : JSON.stringify(values)});
  return answer.status === 204 ? null : answer.json();
}

async function ask(address, how = {}) {
  let answer;
  try {
    answer = await fetch(address, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw trouble("network");
  }
  if (answer.ok) return answer;
  const problem = await readProblem(answer.status, await answer.text());
  problem.wait = Number(answer.headers.get("Retry-After"));
  if (problem.code === "throttled" && problem.wait <= 3) {
    await new Promise(done => setTimeout(done, 1000 * problem.wait));      // so short that nobody needs to know
    return ask(address, how);
  }
  if (problem.code === "unauthenticated" && me.name && !/\/(login|password|confirm)$/.test(address)) await logInAgain();
  else if (problem.code !== "unconfirmed" || !await confirmPassword()) throw problem;
  return ask(address, how);
}

function readProblem(status, text) {
  try {
    return new Problem(status, JSON.parse(text));
  } catch {
    return new Problem(status, {code: status >= 502 && status <= 504 ? "busy" : "internal"});
  }
}

// run something a person asked for; a failure becomes a message
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    toast(explain(error), {kind: "bad"});
    if (!(error instanceof Problem)) throw error;
    return undefined;
  }
}

// ---- toasts, sheets, menus

function toast(text, {kind = "", label, run} = {}) {
  const box = h("div.toast" + (kind && "." + kind), {role: kind === "bad" ? "alert" : null}, h("span", {}, text));
  const close = () => box.remove();
  if (label) box.append(button(label, () => { close(); run(); }));
  box.append(button(t("Close"), close, {className: "quiet"}));
  const boxes = find(".toasts"), over = [...document.querySelectorAll("dialog[open]")].pop() || document.body;
  if (boxes.parentNode !== over) over.append(boxes);     // what lies behind a dialog cannot be clicked
  for (const old of boxes.querySelectorAll(".toast:not(.bad)")) old.remove();
  boxes.append(box);
  let timer = setTimeout(close, label || kind ? 10000 : 5000);
  box.addEventListener("pointerenter", () => clearTimeout(timer));
  box.addEventListener("pointerleave", () => { timer = setTimeout(close, 4000); });
  return close;
}

function removeDialog(box) {
  document.body.append(find(".toasts"));
  box.close();                                           // gives the focus back
  box.remove();
  const back = document.activeElement;
  if (back.tagName !== "TEXTAREA") return;
  back.blur();                                           // Chromium's caret did not come back with the focus
  back.focus();
}

// a modal dialog; resolves to what close(value) was called with, undefined if it was dismissed
function sheet(title, build, kind = "") {
  return new Promise(resolve => {
    const close = value => {
      resolve(value);
      removeDialog(box);
    };
    const leave = async () => { if (!isTyped(box) || await askToLeave()) close(); };
    const box = h("dialog.sheet" + kind, {
      "aria-label": title || null,
      oncancel: event => {
        event.preventDefault();
        leave();
      },
      onclick: event => event.target === box && leave()
    });
    box.leave = leave;
    box.append(h("div.inside", {}, title && h("h2", {}, title), build(close)));
    document.body.append(box);
    box.showModal();
  });
}

const buttonsRow = (...buttons) => h("div.buttons", {}, ...buttons);
const askYesNo = (title, text, yes) => sheet(title, close => [h("p", {}, text), buttonsRow(
  button(t("Cancel"), () => close(false)), button(yes, () => close(true), {className: "danger", autofocus: true}))]);

// what somebody typed never goes without a question, by whatever way it is left
const TYPED = "form:not(.gate *, .search, .limits) :is(input:not([type=password]), textarea), .rename";
const isTyped = (root = document) => root === document && isEdited() || [...root.querySelectorAll(TYPED)].some(one =>
  one.type === "checkbox" ? one.checked !== one.defaultChecked : one.value !== one.defaultValue);
const askToLeave = () => askYesNo(t("Leave without saving?"), t("What you typed is lost then."), t("Leave"));

// ask for values: askForm("New folder", [field(…)], "Create", values => …); an error stays in the sheet
function askForm(title, fields, yes, run, hint) {
  return sheet(title, close => {
    const problem = h("p.problem", {role: "alert"});
    return h(
      "form",
      {
        onsubmit: async event => {
          event.preventDefault();
          problem.textContent = "";
          try {
            close(await run(Object.fromEntries(new FormData(event.target)), event.target));
          } catch (error) {
            problem.textContent = explain(error);
          }
        }
      },
      hint && h("p", {}, hint),
      fields,
      problem,
      buttonsRow(button(t("Cancel"), () => close()), h("button.primary", {}, yes))
    );
  });
}

// rows: {label, run, key, mark} or null for a line; at: {x, y} or an element
function menu(at, rows, title = t("Actions")) {
  return sheet(
    "",
    close => {
      const items = rows.map(row =>
        row ? h(
              "button.item",
              {
                type: "button",
                role: "menuitem" + (row.mark === undefined ? "" : "radio"),
                "aria-checked": row.mark === undefined ? null : String(row.mark),
                onclick: () => {
                  close();
                  row.run();
                }
              },
              h("span", {}, row.label),
              row.key && h("kbd", {}, row.key)
            ) : h("hr")
      );
      const box = h("div.items", {role: "menu", "aria-label": title, onkeydown: event => moveInMenu(event, box)},
        items
      );
      requestAnimationFrame(() => placeMenu(box.closest("dialog"), at));
      return box;
    },
    ".menu"
  );
}

function placeMenu(box, at) {
  if (isPhone.matches) return;
  const spot = at instanceof Element ? at.getBoundingClientRect() : {left: at.x, bottom: at.y, top: at.y};
  const fits = spot.bottom + box.offsetHeight + 8 < innerHeight;
  box.style.left = Math.max(8, Math.min(spot.left, document.documentElement.clientWidth - box.offsetWidth - 8)) + "px";
  box.style.top = Math.max(8, fits ? spot.bottom + 4 : Math.max(8, spot.top - box.offsetHeight - 4)) + "px";
}

function moveInMenu(event, box) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const items = [...box.querySelectorAll("button")];
  items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
}

// ---- the entrance: setting up, logging in

const me = {name: ""};
const view = {kind: "", path: "", at: null, title: ""};

const nameField = about =>
  field(t("Name"), {
    name: "name",
    autocomplete: "username",
    autocapitalize: "none",
    spellcheck: false,
    maxLength: 64,
    ...about
  });
const passwordField = (label, about) =>
  field(label, {type: "password", name: "password", autocomplete: "current-password", ...about});

// password managers want to know whose password it is
const ownName = (name = me.name) =>
  h("input", {name: "user", autocomplete: "username", value: name, readOnly: true, hidden: true});

// the page of one form that stands for everything before somebody is logged in
function showGate(title, text, fields, yes, run) {
  setTitle(title);
  view.turn = (view.turn || 0) + 1;      // what is still on its way to the view before comes to nothing
  Object.assign(view, {kind: "", path: ""});
  const problem = h("p.problem", {role: "alert"}), submit = h("button.primary", {}, yes);
  const form = h("form", {onsubmit: async event => {
    event.preventDefault();
    problem.textContent = "";
    Object.assign(submit, {disabled: true, textContent: t("One moment…")});
    await run(Object.fromEntries(new FormData(form))).catch(error => { problem.textContent = explainGate(error); });
    Object.assign(submit, {disabled: false, textContent: yes});
  }}, fields, problem, submit);
  find("#app").replaceChildren(h("main.gate", {},
    h("div.brand", {}, icon("collection"), "cloudserver"), h("h1", {}, title), text && h("p", {}, text),
    fields.length ? form : null, languageLinks()));
  const first = find("input", form);
  if (first && !isPhone.matches) first.focus();
}

// here the server's own words say more than ours: which password is too easy, which name is taken
function explainGate(error) {
  return ["bad-request", "forbidden"].includes(error.code) ? t(error.message) : explain(error);
}

const languageLinks = () => choices(LANGUAGES, language, chooseLanguage);

async function chooseLanguage(name) {
  localStorage.setItem("language", name);
  await setLanguage(name);
  start();
}

function showSetup() {
  const token = location.hash.slice(1);
  const password = passwordField(t("Password"), {autocomplete: "new-password", minLength: 10,
    placeholder: t("10 characters or more")});
  const again = passwordField(t("Password again"), {name: "again", autocomplete: "new-password"});
  showGate(
    t("Welcome"),
    t("Choose a name and a password for the first account. It may do everything, also make further accounts."),
    [nameField(), password, again],
    t("Create account"),
    async values => {
      if (values.password !== values.again)
        throw new Problem(0, {code: "bad-request", detail: "The two passwords differ."});
      await api("POST", "setup", {token, name: values.name.trim(), password: values.password});
      history.replaceState(null, "", addressOf(""));
      await start();
    }
  );
}

function showLogin() {
  me.name = "";
  const back = location.pathname.endsWith("/login")
    ? new URLSearchParams(location.search).get("next")
    : location.pathname + location.search;
  showGate(t("Log in"), "", [nameField(), passwordField(t("Password"))], t("Log in"), async values => {
    await api("POST", "login", {name: values.name.trim(), password: values.password});
    const inside = back && back.startsWith(PREFIX + "/") && !back.startsWith("//");
    history.replaceState(null, "", inside ? back : addressOf(""));
    await start();
  });
}

// the session ended while the page was open: everything waits for this one sheet
let loggingIn = null;
function logInAgain() {
  loggingIn = loggingIn || askPassword(t("Please log in again"), t("Log in"), t("Your session has ended."),
    password => api("POST", "login", {name: me.name, password})).then(done => {
      loggingIn = null;
      if (!done) {
        showLogin();
        throw new DOMException("", "AbortError");
      }
      watchServer();
    });
  return loggingIn;
}

const askPassword = (title, yes, hint, run) =>
  askForm(title, [ownName(), passwordField(t("Password"), {autofocus: true})], yes,
  ({password}) => run(password).then(() => true), hint);
const confirmPassword = () =>
  askPassword(t("Your password, please"), t("Continue"), t("This needs your password once more."),
  password => api("POST", "confirm", {password}));

async function logOut() {
  await attempt(() => api("POST", "logout"));
  forgetMe();
  history.pushState(null, "", PREFIX + "/login");
  showLogin();
}

async function start(asked = api("GET", "")) {
  patience = 0;
  try {
    const about = await asked;
    if (!about.set_up) return location.pathname.endsWith("/setup") && location.hash ? showSetup()
      : showGate(t("Not set up yet"), t(PROBLEMS["not-set-up"]), [], "", null);
    if (!about.me) return showLogin();
    Object.assign(me, about.me, {most: about.limits.file});
    if (/\/(setup|login)?$/.test(location.pathname)) history.replaceState(null, "", addressOf(""));
    buildFrame();
    return show();
  } catch (error) {
    if (["network", "busy"].includes(error.code)) return showOffline();
    return showGate(t("Cannot reach the server"), explain(error), [], "", null);
  }
}

// nobody has to reload: the page starts as soon as the server answers
function showOffline() {
  showGate(t(navigator.onLine ? "Cannot reach the server" : "You are offline"),
    t("It goes on by itself when the connection is back."), [], "", null);
  startLater();
}

let patience = 0;
function startLater(wait = 5000) {
  clearTimeout(patience);
  patience = setTimeout(() =>
    fetch(apiAddress("")).then(answer => answer.ok ? start() : startLater(), () => startLater()), wait);
}

// ---- the frame around every view

const NAVIGATION = [["files", "Files", "/files"], ["starred", "Starred", "/starred"],
  ["activity", "Activity", "/activity"], ["trash", "Trash", "/trash"], ["settings", "Settings", "/settings"]];

function buildFrame() {
  const search = h("input",
    {type: "search", name: "q", placeholder: t("Search"), "aria-label": t("Search"), autocomplete: "off",
                             spellcheck: false, oninput: searchSoon, onkeydown: onSearchKey});
  const form = h("form.search", {role: "search", onsubmit: event => {
    event.preventDefault();
    search.blur();
    if (!search.value && view.kind !== "search") seek({});
  }}, search);
  const make = event => menu(event.currentTarget, menuRows(actionsFor("place").filter(one => one.make)), t("New"));
  const links = NAVIGATION.map(([name, label, address]) =>
    h("a", {href: PREFIX + address, "data-view": name}, t(label)));
  find("#app").replaceChildren(
    h("a.skip", {href: "#content"}, t("Skip to the files")),
    h("header.side", {},
      h("a.brand", {href: addressOf("")}, icon("collection"), "cloudserver"),
      button(t("New"), make, {className: "primary new", "aria-haspopup": "menu"}),
      h("nav", {"aria-label": t("Main")}, links),
      h("div.quota")),
    h("main", {id: "content", tabIndex: -1},
      h("h1.unseen", {}, "cloudserver"),
      h("div.banners"),
      h("div.top", {}, h("nav.crumbs", {"aria-label": t("Where you are")}), form),
      h("div.bar", {role: "toolbar", "aria-label": t("Actions")}),
      h("div.content")),
    h("section.queue", {"aria-label": t("Uploads"), hidden: true}));
  showQuota();
  showQueue();
  watchServer();
  showBroken().catch(() => {});
}

function showQuota() {
  const {used, quota} = me;
  find(".quota").replaceChildren(
    ...quota === null ? [] : [gauge(t("Storage used"), used, quota || 1)],
    h("span", {}, usedWords(me)));
}

const updateQuota = soon(async () => { Object.assign(me, await api("GET", "account")); showQuota(); }, 1500, true);

// run it once, a little later, however often it is asked for; often: being asked again does not put it off
function soon(work, wait, often = false) {
  let timer = 0, spent = 0, latest;
  const run = async () => {
    const begun = performance.now();
    timer = 0;
    try {
      await work(...latest);
    } catch { /* what nobody asked for says nothing */ }
    spent = performance.now() - begun;
  };
  return (...args) => {
    latest = args;
    if (often && timer) return;
    clearTimeout(timer);
    timer = setTimeout(run, wait + 3 * spent * often);
  };
}

function setTitle(text) {
  view.title = plain(text);
  drawTitle();
  const heading = find("#content > h1");
  if (heading) heading.textContent = view.title;
}

// how far the uploads are stands first: it is all that a tab in the background shows
function drawTitle() {
  const percent = queue.percent === null ? "" : t("{n} %", {n: queue.percent}) + " – ";
  document.title = percent + view.title + " – cloudserver";
}

function setCrumbs(...parts) {
  find(".crumbs").replaceChildren(
    ...parts.flatMap((part, n) => (n ? [h("span.slash", {"aria-hidden": "true"}, "/"), part] : [part]))
  );
}

// a view that is no place among the files
function enterView(kind, title) {
  Object.assign(view, {kind, path: "", at: null});
  setTitle(title);
  setCrumbs(h("span", {"aria-current": "page"}, title));
}

function setBar(...parts) {
  find(".bar").replaceChildren(...parts.flat(9).filter(Boolean));
}

function setContent(...parts) {
  find(".content").replaceChildren(...parts.flat(9).filter(Boolean));
}

// ---- addresses and views

const SHOWS = [
  [/^\/files(?:\/(.*))?$/, showFiles],
  [/^\/past\/([^/]+)(?:\/(.*))?$/, showPast],
  [/^\/versions\/(.*)$/, showVersions],
  [/^\/starred$/, showStarred],
  [/^\/trash$/, showTrash],
  [/^\/activity$/, showActivity],
  [/^\/search$/, showSearch],
  [/^\/settings(?:\/(.*))?$/, showSettings],
  [/^\/login\/v2\/flow\/(.+)$/, showGrant]
];

async function go(address, {replace = false, deep} = {}) {
  if (!await mayLeave()) return undefined;
  if (!replace) history.replaceState({...history.state, scroll: scrollY}, "");
  history[replace ? "replaceState" : "pushState"]({inside: true, deep}, "", address);
  return show();
}

async function show() {
  const address = location.pathname.slice(PREFIX.length).replace(/(.)\/$/, "$1");
  const [pattern, run] = SHOWS.find(([pattern]) => pattern.test(address)) || SHOWS[0];
  const parts = (address.match(pattern) || ["", ""]).slice(1).map(part => part || "");
  const turn = view.turn = (view.turn || 0) + 1, {state} = history, scroll = state && state.scroll;
  Object.assign(view, {address: location.href, state});
  closePreview();
  const late = setTimeout(() => markBusy(true), 250);
  try {
    await run(...parts);
  } catch (error) {
    if (error.name === "AbortError" || turn !== view.turn) return;
    showFailure(error, address);
  }
  clearTimeout(late);
  if (turn !== view.turn) return;
  markBusy(false);
  for (const one of document.querySelectorAll("nav a[data-view]")) {
    const here = one.dataset.view === view.kind ||
      (one.dataset.view === "files" && ["past", "versions", "search"].includes(view.kind));
    here ? one.setAttribute("aria-current", "page") : one.removeAttribute("aria-current");
  }
  document.body.dataset.view = view.kind;
  if (!find(".search")) return; // a gate took the place of the frame
  if (view.kind !== "search") find(".search input").value = "";
  if (scroll) scrollTo(0, scroll);
}

// what is on the screen is not what the address says, yet
function markBusy(yes) {
  const content = find(".content");
  if (content) content.ariaBusy = yes ? "true" : null;
}

// a view that cannot be shown says so in its place
function showFailure(error, address) {
  const [, kind, rest] = address.match(/^\/(\w*)\/?(.*)$/);
  const path = ["files", "versions"].includes(kind) ? decodePath(rest) : "";
  const [, label = "Files"] = NAVIGATION.find(([name]) => name === kind) || [];
  enterView("failed", nameOf(path) || t(label));
  if (path) setCrumbs(...crumbsOf(path, addressOf));
  setBar();
  setContent(failureBox(error, show, path));
}

const isGone = error => ["not-found", "gone"].includes(error.code);

function failureBox(error, again, path = "") {
  if (!(error instanceof Problem)) reportError(error);
  const gone = isGone(error);
  return h("div.empty", {role: "alert"},
    h("p.big", {}, gone && path ? t("“{name}” is not there (any more).", {name: nameOf(path)}) : explain(error)),
    gone && path && h("p", {}, t("It was moved, renamed or deleted, or it is somebody else's.")),
    h("div.acts", {}, gone
      ? [link(t("To the files"), addressOf(""), {className: "button"}),
         link(t("Look in the trash"), PREFIX + "/trash", {className: "button"})]
      : button(t("Try again"), again)));
}

// back and forward have changed the address already: it is put back while somebody is asked
async function onPop() {
  if (!me.name) return;
  const sheets = [...document.querySelectorAll("dialog.sheet")].filter(box => box.leave);
  if (isEdited() || isTyped(find("#app"))) {
    if (location.href === view.address) return;
    history.pushState(view.state, "", view.address);
    if (!leaving && await mayLeave()) history.back();
    return;
  }
  for (const box of sheets.reverse()) await box.leave();
  show();
}

function onLinkClick(event) {
  const target = event.target.closest && event.target.closest("a[href]");
  if (!target || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey
    || event.altKey)
    return;
  if (
    target.origin !== location.origin || target.hasAttribute("download") ||
    target.target || target.getAttribute("href")[0] === "#"
  )
    return;
  if (target.pathname.startsWith(PREFIX + "/api/")) return;
  event.preventDefault();
  go(target.pathname + target.search, {replace: target.href === location.href});
}

// ---- the list: of however many entries, only the rows in sight exist

const list = {
  entries: [],
  known: new Map(),
  rows: new Map(),
  selected: new Set(),
  at: -1,
  anchor: -1,
  editing: null,
  box: null
};
const sorting = {by: localStorage.getItem("sort") || "name", down: localStorage.getItem("down") === "1"};
const finger = matchMedia("(pointer: coarse)");
const mouse = matchMedia("(hover: hover)");        // a finger that rests on a row selects it, and does not drag
let shape = localStorage.getItem("shape") || "list";

const SORTS = {
  name: (a, b) => compare(a.sortKey, b.sortKey),
  size: (a, b) => a.size - b.size,
  mtime: (a, b) => compare(a.mtime, b.mtime),
  deleted: (a, b) => compare(a.deleted, b.deleted)
};
const compare = (a, b) => a < b ? -1 : a > b ? 1 : 0;

// "Photo 9.jpg" before "photo 10.jpg", "Äpfel" beside "Apfel"; plain strings compare far faster than a collator
function sortKeyOf(name) {
  const plain = /^[\x00-\x7f]*$/.test(name) ? name : name.normalize("NFKD").replace(/\p{M}+/gu, "");
  return plain.toLowerCase().replace(/\d+/g, digits => digits.padStart(12, "0"));
}

function sortEntries(entries) {
  const order = SORTS[sorting.by] || SORTS.name,
    sign = sorting.down ? -1 : 1;
  for (const entry of entries) entry.sortKey = entry.sortKey || sortKeyOf(entry.name);
  return entries.sort(
    (a, b) =>
      (a.kind === "file") - (b.kind === "file") ||
      sign * order(a, b) || compare(a.sortKey, b.sortKey) || compare(a.name, b.name)
  );
}

function sortBy(by) {
  sorting.down = sorting.by === by ? !sorting.down : by !== "name";
  sorting.by = by;
  localStorage.setItem("sort", by);
  localStorage.setItem("down", sorting.down ? "1" : "");
  fillList(sortEntries(list.entries));
}

const COLUMNS = {name: "Name", mtime: "Modified", size: "Size", deleted: "Deleted"};

// columns: those after the name; sortable: may the reader choose the order?
function makeList({columns, sortable = true, empty}) {
  Object.assign(list, {entries: [], columns, sortable, empty, at: -1, anchor: -1, editing: null, more: false});
  list.selected.clear();
  list.rows.clear();
  const head = ["name", ...columns].map(name =>
    h(
      "div." + name,
      {role: "columnheader"},
      sortable ? button(t(COLUMNS[name]), () => sortBy(name), {"data-sort": name}) : h("span", {}, t(COLUMNS[name]))
    )
  );
  list.body = h("div.rows", {role: "rowgroup"});
  list.head = h("div.head", {role: "rowgroup"},
    h("div.cells", {role: "row", "aria-rowindex": 1}, h("div.check", {role: "columnheader"}, checkAll()), head)
  );
  list.box = h(
    "div.grid",
    {
      role: "grid",
      tabIndex: 0,
      "aria-multiselectable": "true",
      "aria-label": t("Files"),
      onkeydown: onListKey,
      onfocus: () => { if (list.at < 0 && list.entries.length) setCursor(0); }
    },
    list.head,
    list.body
  );
  list.note = h("div.empty", {hidden: true});
  watchPointer(list.body);
  return [list.box, list.note];
}

const checkAll = () => h("input", {type: "checkbox", className: "all", tabIndex: -1, "aria-label": t("Select all"),
                                   onchange: event => event.target.checked ? selectAll() : clearSelection()});

function fillList(entries) {
  const cursor = list.entries[list.at], anchor = list.entries[list.anchor];
  list.entries = entries;
  list.known = new Map(entries.map((entry, index) => [entry.node, index]));
  for (const id of list.selected) if (!list.known.has(id)) list.selected.delete(id);
  list.at = cursor && list.known.has(cursor.node) ? list.known.get(cursor.node) : Math.min(list.at, entries.length - 1);
  list.anchor = anchor && list.known.has(anchor.node) ? list.known.get(anchor.node) : -1;
  list.box.classList.toggle("tiles", shape === "tiles");
  list.box.setAttribute("aria-rowcount", entries.length + 1);
  list.box.hidden = !entries.length;
  list.note.hidden = Boolean(entries.length);
  if (!entries.length) list.note.replaceChildren(...[list.empty()].flat());
  for (const one of list.head.querySelectorAll("[data-sort]")) {
    const own = one.dataset.sort === sorting.by;
    one.parentNode.setAttribute("aria-sort", own ? sorting.down ? "descending" : "ascending" : "none");
  }
  redrawRows(same);
  showBar();
}

const same = (a, b) => b
  && ["node", "etag", "path", "mtime", "size", "since", "starred", "snippet"].every(name => a[name] === b[name]);

// rows that would look as they do stay: a click that is under way must not lose its target
function redrawRows(keep = () => false) {
  for (const [index, row] of list.rows) {
    const entry = list.entries[index];
    if (keep(row.entry, entry)) markRow(row, row.entry = entry, index);
    else {
      row.remove();
      list.rows.delete(index);
    }
  }
  drawRows();
}

// where things are: a list has one column, tiles as many as fit
function measureList() {
  const tiles = shape === "tiles", width = list.body.clientWidth;
  const columns = tiles ? Math.max(2, Math.floor(width / (isPhone.matches ? 150 : 190))) : 1;
  const height = tiles ? 176 : (isPhone.matches ? 60 : 44) + 22 * (view.kind === "search");
  return {columns, width: width / columns, height};
}

function drawRows() {
  if (!list.box || !list.box.isConnected || list.box.hidden) return;
  const {columns, width, height} = (list.size = measureList());
  const total = Math.ceil(list.entries.length / columns) * height,
    top = list.body.getBoundingClientRect().top;
  if (list.total !== total || list.body.style.height !== total + "px")
    list.body.style.height = (list.total = total) + "px";
  const first = Math.max(0, Math.floor((-top - 200) / height) * columns);
  const last = Math.min(list.entries.length, Math.ceil((innerHeight - top + 200) / height) * columns);
  for (const [index, row] of list.rows)
    if ((index < first || index >= last) && index !== list.at && list.entries[index] !== list.editing) {
      row.remove();
      list.rows.delete(index);
    }
  const wanted = list.at >= 0 && list.at < list.entries.length ? [list.at] : [];
  for (let index = first; index < last; index++) wanted.push(index);
  for (const index of wanted)
    if (!list.rows.has(index)) {
      const row = makeRow(list.entries[index], index);
      row.style.transform = `translate(${(index % columns) * width}px, ${Math.floor(index / columns) * height}px)`;
      if (columns > 1) row.style.width = width + "px";
      list.rows.set(index, row);
      list.body.append(row);
    }
}

function makeRow(entry, index) {
  const chosen = list.selected.has(entry.node);
  const row = h("div.row.cells",
    {role: "row", id: "row" + index, "aria-rowindex": index + 2, "aria-selected": String(chosen)},
    h("div.check", {role: "gridcell"},
      h("input", {type: "checkbox", tabIndex: -1, checked: chosen,
        "aria-label": t("Select {name}", {name: entry.name})})
    ),
    h("div.name", {role: "gridcell"},
      shape === "tiles" ? tilePicture(entry) : icon(categoryOf(entry)),
      list.editing === entry ? renameField(entry) : entryName(entry),
      entry.since && h("span.tag", {}, t("{how} since", {how: t(HOW[entry.since])})),
      entry.starred && svg("svg", {viewBox: "0 0 24 24", class: "star", role: "img", "aria-label": t("Starred")},
        svg("path", {d: STAR}))
    ),
    list.columns.map(column => h("div." + column, {role: "gridcell"}, cellOf(entry, column))),
    h("div.more", {role: "gridcell"},
      h("button", {type: "button", tabIndex: -1, "aria-label": t("Actions for {name}", {name: entry.name})}, "⋯")
    )
  );
  row.entry = entry;
  row.classList.toggle("cursor", index === list.at);
  row.classList.toggle("cut", clip.verb === "move" && clip.ids.has(entry.node));
  return row;
}


function entryName(entry) {
  const draggable = view.kind === "files" && mouse.matches;
  const about = {className: "label", title: entry.name, tabIndex: -1, draggable};
  const label = h("a", {...about, href: addressFor(entry)}, h("bdi", {}, entry.name));
  const where = ["search", "starred", "trash"].includes(view.kind) ? parentOf(entry.path) || t("Files") : null;
  return h("div.names", {},
    label,
    h("div.second" + (where ? ".where" : ""), {},
      where && h("bdi", {}, where),
      h("span.small", {},
        (where ? " · " : "") + formatTime(entry.deleted || entry.mtime) + " · " + formatSize(entry.size)
      )
    ),
    entry.snippet && h("div.snippet", {}, entry.snippet.before.replace(/^.+? (?=.{0,30}$)/, "… "),
      h("mark", {}, entry.snippet.match), entry.snippet.after)
  );
}

function tilePicture(entry) {
  const kind = view.at || view.kind === "trash" ? "" : pictureKind(entry.media || "", entry.size);
  if (!kind) return h("div.picture", {}, icon(categoryOf(entry)));
  const picture = h("img", {alt: "", decoding: "async", draggable: false});
  picture.onerror = () => picture.replaceWith(icon(categoryOf(entry)));
  if (kind === "small") picture.src = contentAddress(entry);
  else showThumbnail(entry, kind, picture).catch(() => picture.replaceWith(icon(kind)));
  return h("div.picture." + kind, {}, picture);
}

// ---- thumbnails: made by the browser that first sees or uploads a picture, and kept by the server for all

const making = [Promise.resolve(), Promise.resolve()];       // two at a time
const ORIGINAL_MOST = 40 << 20, METERED_MOST = 300 << 10;     // bytes of an original that is loaded for it
const unpaintable = new Set();         // media types that this browser turned out not to know

const isMetered = () => Boolean(navigator.connection?.saveData || navigator.connection?.type === "cellular");

// "small" ones show themselves
const pictureKind = (media, size) => /^video/.test(media) ? isMetered() ? "" : "video"
  : /^image/.test(media) && size < ORIGINAL_MOST && !unpaintable.has(media) ? size < 100 << 10 ? "small" : "image" : "";
const thumbnailAddress = entry => apiAddress("thumbnails", entry.path, {version: entry.version});

async function showThumbnail(entry, kind, picture) {
  const answer = await ask(thumbnailAddress(entry));
  let blob = answer.status === 200 && await answer.blob();
  if (!blob) {
    const work = making.shift().then(() => picture.isConnected && thumbnailOf(kind, entry));
    making.push(work.catch(() => {}));
    blob = await work;
    if (!blob) return picture.isConnected && picture.onerror();
    if (!me.readonly) keepThumbnail(entry, blob).catch(() => {});
  }
  picture.onload = () => URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(blob);
}

const keepThumbnail = async (entry, body) => body.size < entry.size
  && ask(thumbnailAddress(entry), {method: "PUT", headers: HEADERS, body});

// at the side, once a picture was uploaded; what fails here is made up for by whoever sees it first
async function depict(file, path) {
  const kind = pictureKind(file.type, file.size);
  if (!/image|video/.test(kind)) return;
  const blob = await thumbnailOf(kind, {media: file.type, size: file.size}, file), entry = await load(path);
  if (blob && entry.size === file.size) await keepThumbnail(entry, blob);
}

// null if this browser cannot, or should not for what it costs
async function thumbnailOf(kind, entry, file) {
  const address = file ? URL.createObjectURL(file) : location.origin + contentAddress(entry);
  const film = kind === "video" && await frameOf(address), most = isMetered() ? METERED_MOST : ORIGINAL_MOST;
  const {blob, unknown} = await paint({film, file, address, size: entry.size, most}, film ? [film] : []);
  if (file) URL.revokeObjectURL(address);
  if (unknown && !/jpeg|png|webp/.test(entry.media)) unpaintable.add(entry.media);
  return blob;
}

// a second from the start, where it is hardly black any more
function frameOf(address) {
  return new Promise((done, fail) => {
    const start = () => { video.currentTime = Math.min(1, video.duration / 2); };
    const take = () => createImageBitmap(video).then(done, fail).finally(() => video.removeAttribute("src"));
    const video = h("video", {muted: true, preload: "auto", playsInline: true, src: address,
                              onloadedmetadata: start, onseeked: take, onerror: fail});
    setTimeout(fail, 20000);
  });
}

// the painter works beside the page, which stays at the reader's service
const orders = new Map();
let painter = null, ordered = 0;

function paint(order, things) {
  if (!window.OffscreenCanvas) return {};
  if (!painter) {
    painter = new Worker(PREFIX + "/painter.js");
    painter.onmessage = ({data: {id, ...found}}) => orders.get(id)(found);
  }
  return new Promise(done => {
    const id = ++ordered;
    orders.set(id, found => orders.delete(id) && done(found));
    painter.postMessage({...order, id}, things);
  });
}

const cellOf = (entry, column) => column === "size" ? formatSize(entry.size) : timeElement(entry[column]);

const selection = () => [...list.selected].map(id => list.entries[list.known.get(id)]).filter(Boolean);

function setSelection(ids) {
  list.selected = new Set(ids);
  for (const [index, row] of list.rows) markRow(row, list.entries[index], index);
  showBar();
}

function markRow(row, entry, index) {
  row.classList.toggle("cursor", index === list.at);
  const chosen = list.selected.has(entry.node);
  row.setAttribute("aria-selected", String(chosen));
  find("input", row).checked = chosen;
}

const clearSelection = () => setSelection([]);
const selectAll = () => setSelection(list.entries.map(entry => entry.node));

function setCursor(index, {quiet = false} = {}) {
  const old = list.rows.get(list.at);
  if (old) old.classList.remove("cursor");
  list.at = index;
  drawRows();
  const row = list.rows.get(index);
  if (!row) return;
  row.classList.add("cursor");
  list.box.setAttribute("aria-activedescendant", row.id);
  if (!quiet) showCursor(index);
}

// scroll as little as needed; the head and, on a phone, the navigation cover the edges
function showCursor(index) {
  const top = list.body.getBoundingClientRect().top + Math.floor(index / list.size.columns) * list.size.height;
  const above = top - 130, below = top + list.size.height - innerHeight + 70;
  if (above < 0) scrollBy(0, above);
  else if (below > 0) scrollBy(0, below);
}

// click: only this one; with Ctrl: this one too, or not; with Shift: all from the last to this one
function pick(index, {toggle = false, range = false} = {}) {
  const id = list.entries[index].node;
  if (range && list.anchor >= 0) {
    const [from, to] = [Math.min(list.anchor, index), Math.max(list.anchor, index)];
    setSelection([...(toggle ? list.selected : []), ...list.entries.slice(from, to + 1).map(entry => entry.node)]);
  } else {
    list.anchor = index;
    const chosen = new Set(toggle ? list.selected : []);
    toggle && chosen.has(id) ? chosen.delete(id) : chosen.add(id);
    setSelection(chosen);
  }
  setCursor(index, {quiet: true});
}

// ---- pointing at the list: click, touch, rubber band

const indexAt = target => {
  const row = target.closest(".row");
  return row ? Number(row.id.slice(3)) : -1;
};

function watchPointer(body) {
  let held = 0,
    touch = false;
  body.addEventListener("pointerdown", event => {
    touch = event.pointerType === "touch";
    clearTimeout(held);
    if (touch) held = setTimeout(() => holdRow(event), 500);
    else if (event.button === 0) startBand(event);
  });
  for (const name of ["pointerup", "pointercancel", "pointermove"]) {
    body.addEventListener(name, event => {
      if (name !== "pointermove" || Math.hypot(event.movementX, event.movementY) > 3) clearTimeout(held);
    });
  }
  body.addEventListener("click", event => onRowClick(event, touch));
  body.addEventListener("dblclick", event => {
    const index = indexAt(event.target);
    if (index >= 0 && !event.target.closest("a, input, button") && !touch) openEntry(list.entries[index]);
  });
  body.addEventListener("contextmenu", event => {
    const index = indexAt(event.target);
    if (event.target.closest("input") || index < 0) return;
    event.preventDefault();
    event.stopPropagation();
    if (touch) return;
    if (!list.selected.has(list.entries[index].node)) pick(index);
    openMenu({x: event.clientX, y: event.clientY});
  });
}

let heldRow = false;                   // the click that ends a long press means nothing more

function holdRow(event) {
  const index = indexAt(event.target);
  if (index < 0) return;
  heldRow = true;
  pick(index, {toggle: true});
}

function onRowClick(event, touch) {
  const index = indexAt(event.target);
  if (heldRow || index < 0 || event.target.closest(".rename")) {
    if (heldRow) event.preventDefault();
    heldRow = false;
    return;
  }
  const entry = list.entries[index], label = event.target.closest(".label");
  if (event.target.closest(".more")) {
    if (!list.selected.has(entry.node)) pick(index);
    openMenu(event.target.closest(".more"));
  } else if (event.target.closest(".check")) {
    event.target.closest("input") || event.preventDefault();
    pick(index, {toggle: true, range: event.shiftKey});
  } else if (event.shiftKey || event.ctrlKey || event.metaKey || touch && list.selected.size) {
    event.preventDefault();
    pick(index, {toggle: event.ctrlKey || event.metaKey || touch && !event.shiftKey, range: event.shiftKey});
  } else if (touch || label) {
    event.preventDefault();
    setCursor(index, {quiet: true});
    openEntry(entry);
  } else {
    pick(index);
  }
  list.box.focus({preventScroll: true});
}

// drawing a box with the mouse chooses what it touches; it starts where there is no name
function startBand(event) {
  if (event.target.closest("a, input, button, .label")) return;
  const from = {x: event.pageX, y: event.pageY}, before = event.ctrlKey || event.metaKey ? [...list.selected] : [];
  let band = null;
  const move = now => {
    const width = Math.abs(now.pageX - from.x), height = Math.abs(now.pageY - from.y);
    if (!band && width + height < 8) return;
    if (!band) { document.body.append(band = h("div.band")); document.body.classList.add("banding"); }
    const box = {left: Math.min(from.x, now.pageX), top: Math.min(from.y, now.pageY), width, height};
    for (const [side, value] of Object.entries(box)) band.style[side] = value + "px";
    setSelection([...before, ...entriesIn(box)]);
  };
  const end = () => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    document.body.classList.remove("banding");
    if (!band) return;
    band.remove();
    addEventListener("click", stop => { stop.stopPropagation(); stop.preventDefault(); }, {capture: true, once: true});
    setTimeout(() => dispatchEvent(new Event("click")));       // in case no click follows
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", end);
}

function entriesIn({left, top, width, height}) {
  const {columns, width: wide, height: high} = list.size,
    origin = list.body.getBoundingClientRect();
  const x = left - origin.left - scrollX,
    y = top - origin.top - scrollY,
    ids = [];
  for (let line = Math.max(0, Math.floor(y / high)); line <= Math.floor((y + height) / high); line++) {
    for (
      let column = Math.max(0, Math.floor(x / wide));
      column <= Math.min(columns - 1, Math.floor((x + width) / wide));
      column++
    ) {
      const entry = list.entries[line * columns + column];
      if (entry) ids.push(entry.node);
    }
  }
  return ids;
}

// ---- keys in the list; what else a key does stands in the table of actions

function onListKey(event) {
  if (event.target !== list.box && !event.target.closest(".head")) return;
  const {columns, height} = list.size || {columns: 1, height: 44},
    page = Math.max(1, Math.floor((innerHeight - 200) / height)) * columns;
  const steps = {
    ArrowDown: columns,
    ArrowUp: -columns,
    ArrowRight: columns > 1 ? 1 : 0,
    ArrowLeft: columns > 1 ? -1 : 0,
    PageDown: page,
    PageUp: -page,
    Home: -list.entries.length,
    End: list.entries.length
  };
  if (event.key === " " && list.at >= 0) pick(list.at, {toggle: true});
  else if (!steps[event.key] || event.altKey || event.metaKey) return typeAhead(event);
  else {
    const next = Math.max(
      0,
      Math.min(list.entries.length - 1, (list.at < 0 ? -Math.sign(steps[event.key]) && -1 : list.at) + steps[event.key])
    );
    if (event.shiftKey) {
      if (list.anchor < 0) list.anchor = Math.max(0, list.at);
      pick(next, {range: true});
    } else if (!event.ctrlKey) pick(next);
    setCursor(next);
  }
  return event.preventDefault();
}

const typed = {text: "", at: -900};

function typeAhead(event) {
  if (event.key === "Escape" || event.ctrlKey) typed.at = -900;
  if (event.key.length !== 1 || event.ctrlKey || event.metaKey || event.altKey || " ?/".includes(event.key)) return;
  const within = event.timeStamp - typed.at < 900;
  // the key of an action; within a word, or where it does nothing, a letter
  if (!within && actionOf(event)) return;
  event.preventDefault();
  typed.text = within ? typed.text + event.key : event.key;
  typed.at = event.timeStamp;
  const wanted = sortKeyOf(typed.text),
    index = list.entries.findIndex(entry => entry.sortKey && entry.sortKey.startsWith(wanted));
  if (index >= 0) {
    pick(index);
    setCursor(index);
  }
}

// ---- files

async function showFiles(address) {
  const path = decodePath(address);
  if (showInside(path, "files", null)) return;
  const turn = view.turn, at = new URLSearchParams(location.search).get("at");
  const answer = await loadFirst(path).catch(error => { if (!at) throw error; });
  if (turn !== view.turn) return;
  if (!answer) return go(pastAddress(at, path), {replace: true});       // a link that knows when it was there
  const isFile = answer.kind === "file", holder = isFile ? await loadFirst(parentOf(path)) : answer;
  if (turn !== view.turn) return;
  const entering = enterCollection(holder, turn);
  if (isFile) openPreview(list.entries.find(one => one.path === path) || answer);
  await entering;
  if (isFile && turn === view.turn && preview.box) find(".foot").replaceWith(previewFoot(preview.entry));
}

// is the address one of a file in the list that is on the screen?
function showInside(path, kind, at) {
  if (view.kind !== kind || view.at !== at || !list.box || !list.box.isConnected || !path
    || parentOf(path) !== view.path) return false;
  const entry = list.entries.find(one => one.kind === "file" && one.path === path);
  if (entry) openPreview(entry);
  return Boolean(entry);
}

const load = (path, values) => api("GET", "files/" + encodePath(path), {limit: 10000, ...values});
// what fills the first screens, in the order of the list
const order = () => ({sort: sorting.by in SORTS && sorting.by !== "deleted" ? sorting.by : "name",
  order: sorting.down ? "desc" : "asc", collections_first: 1});
const loadFirst = path => load(path, {limit: 300, ...order()});

async function enterCollection(answer, turn) {
  const same = view.kind === "files" && view.path === answer.path && list.box && list.box.isConnected;
  Object.assign(view, {kind: "files", path: answer.path, at: null, etag: answer.etag, answer});
  if (!preview.box) setTitle(answer.name || t("Files"));
  setCrumbs(...crumbsOf(answer.path, addressOf));
  if (!same) {
    setContent(...makeList({columns: ["mtime", "size"], empty: emptyFiles}), h("div.readme"));
    scrollTo(0, 0);
  }
  await fillFiles(answer, turn, same);
  if (turn === view.turn) await showReadme();
}

// what is there at once, the rest as it comes; a list that stood there before is replaced when all is known
async function fillFiles(answer, turn, whole) {
  let entries = answer.children;
  const asked = order();
  for (let {next} = answer; ; ) {
    list.more = next !== null;
    if (!whole || !list.more) fillList(sortEntries(entries));
    if (!list.more) return;
    const more = await load(answer.path, {after: next, ...asked}), seen = new Set(entries.map(entry => entry.node));
    if (turn !== view.turn) return;
    entries = entries.concat(more.children.filter(entry => !seen.has(entry.node)));
    next = more.next;
  }
}

function crumbsOf(path, address) {
  const names = path ? path.split("/") : [];
  const parts = [
    link(t("Files"), address(""), {"data-path": ""}),
    ...names.map((name, n) =>
      h("a", {href: address(names.slice(0, n + 1).join("/")), "data-path": names.slice(0, n + 1).join("/")},
        h("bdi", {}, name)
      )
    )
  ];
  parts[parts.length - 1].setAttribute("aria-current", "page");
  return parts;
}

const emptyFiles = () => [
  h("p.big", {}, unfinished().some(one => isBelow(one.path, view.path)) ? t("Uploading…") : t("Nothing here yet")),
  h("p", {}, isPhone.matches ? t("Add something with “New”.") : t("Drop files here, or add something with “New”.")),
  ...isPhone.matches ? [] : [h("p", {}, t("From a command line:")),
    commandLine(`curl -u ${shellWord(me.name)} -T FILE ${davAddress(view.path, "/")}`)]
];

// load what is on the screen once more, keeping place and selection
async function refresh() {
  if (list.editing) return;
  const turn = view.turn;
  if (inFiles()) {
    try {
      const answer = await load(view.path, order());
      if (turn === view.turn) await enterCollection(answer, turn);
    } catch (error) {
      if (turn !== view.turn) return;
      if (!isGone(error)) throw error;
      closePreview();
      showFailure(error, "/files/" + encodePath(view.path));
    }
  } else if (["trash", "activity", "search", "starred", "past", "versions"].includes(view.kind)) await show();
  if (find(".foot")) find(".foot").replaceWith(previewFoot(preview.entry));
  updateQuota();
}

const openEntry = entry => go(addressFor(entry));

// ---- actions: one table for the bar, the menus, the keys and the help

const inFiles = () => view.kind === "files";
const inTree = () => ["files", "search", "starred"].includes(view.kind);
const one = items => items.length === 1;
const inTreeAny = items => inTree() && items.length > 0;
const inTreeOne = items => inTree() && one(items);
const isFound = () => inTree() && !inFiles();
const oneFile = items => one(items) && items[0].kind === "file";

// on: what it is for, "items" or the "place" as a whole;  when: does it apply;  menu: stands in the menu only;
// prime: has room in the bar even on a phone;  make: stands under "New";  bar: has a button of its own, in every view
// or in one
const ACTIONS = [
  {name: "upload", label: "Upload files", on: "place", make: true, keys: "U",
   when: () => true, run: () => chooseFiles({})},
  {name: "upload-folder", label: "Upload a folder", on: "place", make: true,
   when: () => "webkitdirectory" in HTMLInputElement.prototype, run: () => chooseFiles({webkitdirectory: true})},
  {name: "photo", label: "Take a photo", on: "place", make: true,
   when: () => finger.matches, run: () => chooseFiles({accept: "image/*", capture: "environment"})},
  {name: "record", label: "Record a video", on: "place", make: true,
   when: () => finger.matches, run: () => chooseFiles({accept: "video/*", capture: "environment"})},
  {name: "new-folder", label: "New folder", on: "place", make: true, keys: "Shift+N",
   when: () => true, run: newCollection},
  {name: "new-text", label: "New text file", on: "place", make: true, when: () => true, run: newText},
  {name: "paste", label: "Paste", on: "place", keys: "Ctrl+V", bar: true,
   when: () => inFiles() && clip.ids.size > 0, run: pasteClip},
  {name: "select-all", label: "Select all", on: "place", keys: "Ctrl+A",
   when: () => list.entries.length > 0, run: selectAll},
  {name: "empty-trash", label: "Empty the trash", on: "place", bar: true,
   when: () => view.kind === "trash" && list.entries.length > 0, run: emptyTrash},
  {name: "download-all", label: "Download this folder", on: "place", bar: "past",
   when: () => (inFiles() || view.kind === "past") && list.entries.length > 0, run: () => downloadZip([])},
  {name: "past", label: "See it as it was…", on: "place", when: inFiles, run: () => go(pastAddress("now", view.path))},
  {name: "past-of", label: "See it as it was…", on: "items", menu: true,
   when: items => inTreeOne(items) && items[0].kind === "collection", run: ([{path}]) => go(pastAddress("now", path))},
  {name: "rewind", label: "Bring this time back", on: "place", bar: true, when: () => view.kind === "past",
    run: rewind},
  {name: "open", label: "Open", on: "items", menu: true, keys: "Enter",
   when: one, run: ([entry]) => openEntry(entry)},
  {name: "show", label: "Show in its folder", on: "items",
   when: items => isFound() && one(items), run: ([entry]) => showInFolder(entry)},
  {name: "download", label: "Download", on: "items", prime: true, keys: "D",
   when: items => view.kind !== "trash" && items.length > 0, run: download},
  {name: "bring-back", label: "Bring back", on: "items", prime: true,
   when: items => view.kind === "past" && items.length > 0, run: bringBack},
  {name: "rename", label: "Rename", on: "items", keys: "F2",
   when: inTreeAny, run: items => one(items) ? startRename(items[0]) : renameMany(items)},
  {name: "move", label: "Move to…", on: "items", keys: "M",
   when: inTreeAny, run: items => moveTo(items, "move")},
  {name: "copy", label: "Copy to…", on: "items", menu: true, keys: "Shift+M",
   when: inTreeAny, run: items => moveTo(items, "copy")},
  {name: "cut", label: "Cut", on: "items", menu: true, keys: "Ctrl+X",
   when: inTreeAny, run: items => putOnClip("move", items)},
  {name: "copy-clip", label: "Copy", on: "items", menu: true, keys: "Ctrl+C",
   when: inTreeAny, run: items => putOnClip("copy", items)},
  {name: "address", label: "Copy address", on: "items", menu: true,
   when: inTreeOne, run: ([entry]) => copyText(location.origin + addressOf(entry.path))},
  {name: "curl", label: "Copy curl command", on: "items", menu: true,
   when: inTreeOne, run: ([entry]) => copyText(curlFor(entry))},
  {name: "edit", label: "Edit", on: "items", menu: true, keys: "E",
   when: items => inTree() && oneFile(items) && mayBeText(items[0]), run: ([entry]) => editFile(entry)},
  {name: "versions", label: "Versions", on: "items",
   when: items => inTree() && oneFile(items), run: ([entry]) => go(versionsAddress(entry.path))},
  {name: "star", label: "Star", on: "items", keys: "S",
   when: items => inTree() && !items.every(entry => entry.starred), run: items => star(items, true)},
  {name: "unstar", label: "Remove star", on: "items", keys: "S",
   when: items => inTreeAny(items) && items.every(entry => entry.starred), run: items => star(items, false)},
  {name: "delete", label: "Delete", on: "items", prime: true, keys: "Delete",
   when: inTreeAny, run: deleteItems},
  {name: "restore", label: "Restore", on: "items", prime: true,
   when: items => view.kind === "trash" && items.length > 0, run: restoreItems},
  {name: "purge", label: "Delete for good", on: "items", prime: true, keys: "Delete",
   when: items => view.kind === "trash" && items.length > 0, run: purgeItems},
  {name: "undo", label: "Undo", on: "page", keys: "Ctrl+Z", when: () => undoable.length > 0, run: undoLast},
  {name: "find", label: "Search", on: "page", keys: "/", when: () => true, run: () => find(".search input").focus()},
  {name: "clear", label: "Clear the selection", on: "page", keys: "Escape",
   when: () => list.selected.size > 0, run: clearSelection},
  {name: "help", label: "Keyboard shortcuts", on: "page", keys: "?", when: () => true, run: showHelp},
];

const actionsFor = (on, items = []) => ACTIONS.filter(action => action.on === on && action.when(items));
const onMac = /Mac|iPhone|iPad/.test(navigator.platform);
const keyNames = {Delete: "Delete", Escape: "Esc", Enter: "Enter"};
const showKeys = keys =>
  keys && t(keys.replace("Ctrl+", onMac ? "⌘" : "Ctrl+").replace(/[A-Z][a-z]+$/, name => keyNames[name] || name))
    .replace("Shift", t("Shift"));
const act = action => attempt(() => action.run(selection()));
const menuRows = actions =>
  actions.map(action =>
    ({label: t(action.label), key: isPhone.matches ? "" : showKeys(action.keys), run: () => act(action)}));

function openMenu(at) {
  const rows = list.selected.size ? menuRows(actionsFor("items", selection())) : placeRows();
  if (rows.length) menu(at, rows);
}

const placeRows = () => [...menuRows(actionsFor("place")), ...viewRows()];

// what the bar shows: the actions of what is selected, else those of the place
function showBar() {
  const items = selection(),
    all = find("input.all");
  if (all)
    Object.assign(all, {
      checked: items.length > 0 && items.length === list.entries.length,
      indeterminate: items.length > 0 && items.length < list.entries.length
    });
  document.body.classList.toggle("selecting", items.length > 0);
  if (!items.length) return setBar(h("span.count", {}, countWords()), placeButtons());
  setBar(
    button(t("Clear"), clearSelection, {className: "quiet", "aria-label": t("Clear the selection")}),
    h("strong.count", {role: "status"}, plural(items.length, "{n} selected", "{n} selected")),
    actionsFor("items", items).filter(action => !action.menu).map(action =>
      button(t(action.label), () => act(action), {className: action.prime ? "prime" : "", "data-action": action.name})),
    button(t("More"), event => openMenu(event.currentTarget), {className: "prime", "aria-haspopup": "menu"})
  );
  return fitBar();
}

// in one line, so that nothing moves under the pointer; what has no room is under "More"
function fitBar() {
  const bar = find(".bar"), others = [...bar.querySelectorAll("button:not(.prime, .quiet)")];
  while (others.length && bar.scrollWidth > bar.clientWidth) others.pop().remove();
}

function countWords() {
  const files = list.entries.filter(entry => entry.kind === "file").length,
    collections = list.entries.length - files;
  return [collections && plural(collections, "{n} folder", "{n} folders"),
    files && plural(files, "{n} file", "{n} files")].filter(Boolean).join(", ") + (list.more ? " …" : "");
}

const placeButtons = () => [
  actionsFor("place").filter(({bar}) => bar === true || bar && bar === view.kind)
    .map(action => button(t(action.label), () => act(action), {"data-action": action.name})),
  button(t("View"), event => menu(event.currentTarget, viewRows(), t("View")), {"aria-haspopup": "menu"}),
  button(t("More"), event => menu(event.currentTarget, menuRows(moreActions())), {"aria-haspopup": "menu"})
];
const moreActions = () => [...actionsFor("place").filter(action => !action.make), ...actionsFor("page")];

const viewRows = () => [
  ...!list.sortable ? [] : [...["name", ...list.columns].map(name => ({
    label: t("Sort by {what}", {what: t(COLUMNS[name])}),
    mark: sorting.by === name,
    run: () => sortBy(name)
  })), null],
  ...[
    ["list", "List"],
    ["tiles", "Tiles"]
  ].map(([name, label]) => ({label: t(label), mark: shape === name, run: () => setShape(name)}))
];

function setShape(name) {
  shape = name;
  localStorage.setItem("shape", name);
  list.box.classList.toggle("tiles", name === "tiles");
  redrawRows();
  fillList(list.entries);
}

// ---- what actions do

const undoable = [];                   // batches of steps of the journal, the latest last

function offerUndo(text, ...seqs) {
  undoable.push(seqs);
  const take = () => undo(undoable.splice(undoable.indexOf(seqs), 1)[0] || seqs);
  toast(text, {label: t("Undo"), run: () => attempt(take)});
}

function undoLast() {
  return undo(undoable.pop());
}

async function undo(seqs) {
  let skipped = 0;
  for (const seq of [...seqs].reverse()) skipped += (await api("POST", "undo", {seq})).skipped;
  toast(
    skipped ? plural(skipped, "Undone, except {n} that changed since.", "Undone, except {n} that changed since.")
      : t("Undone.")
  );
  await refresh();
}

const namesOf = items => items.length === 1 ? quoted(items[0].name) : plural(items.length, "{n} item", "{n} items");

async function deleteItems(items) {
  const {seq} = await api("POST", "delete", {paths: items.map(entry => entry.path)});
  clearSelection();
  dropRows(items);
  offerUndo(t("{what} deleted", {what: namesOf(items)}), seq);
  await refresh();
}

function dropRows(items) {
  const gone = new Set(items.map(entry => entry.node));
  fillList(list.entries.filter(entry => !gone.has(entry.node)));
}

function download(items) {
  if (items.length === 1 && items[0].kind === "file") return saveFrom(contentAddress(items[0]));
  if (isFound() && items.length > 1)
    return items.forEach((entry, n) =>
      setTimeout(() => saveFrom(entry.kind === "file" ? contentAddress(entry) : apiAddress("zip", entry.path)), n * 400)
    );
  if (isFound()) return saveFrom(apiAddress("zip", items[0].path));
  return downloadZip(items.length === list.entries.length ? [] : items.map(entry => entry.name));
}

async function downloadZip(names) {
  const address = apiAddress("zip", view.path, {name: names, at: view.at});
  if (address.length < 8000) return saveFrom(address);
  const {id} = await api("POST", "zip-names", {names});         // too many for an address
  return saveFrom(apiAddress("zip", view.path, {names: id, at: view.at}));
}

function saveFrom(address) {
  const anchor = h("a", {href: address, download: ""});
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
}

const nameInput = (label, value = "") =>
  field(label, {name: "name", value, maxLength: 255, autofocus: true, autocomplete: "off", spellcheck: false});

// ask for a name, make a collection of it in another one; resolves to the new node
const makeCollection = place => askForm(t("New folder"), [nameInput(t("Name"))], t("Create"), async ({name}) => {
  checkName(name);
  return api("POST", "make-collection", {path: join(place, name)});
});

// new things go where the reader is, or else to the top
async function ensureFiles() {
  if (!inFiles()) await go(addressOf(""));
}

async function newCollection() {
  await ensureFiles();
  const made = await makeCollection(view.path);
  if (!made) return;
  await refresh();
  pick(list.known.get(made.node));
  setCursor(list.at);
}

const isName = name => name.trim() && !/^\.\.?$|[/\\\x00-\x1f\x7f]/.test(name) && new Blob([name]).size < 256;

function checkName(name) {
  if (!isName(name)) throw trouble("", t("A name cannot be empty and cannot hold a slash."));
}

const sayTaken = error => { throw error.code === "precondition-failed" ? new Problem(412, {code: "exists"}) : error; };

// ---- renaming in place

function startRename(entry) {
  if (isPhone.matches || view.kind !== "files") {
    return askForm(t("Rename"), [nameInput(t("Name"), entry.name)], t("Rename"), ({name}) => rename(entry, name));
  }
  if (list.editing) return find(".rename").focus();
  list.editing = entry;
  redrawRows();
  const input = find(".rename");
  input.focus();
  const dot = entry.kind === "file" ? entry.name.lastIndexOf(".") : -1;
  input.setSelectionRange(0, dot > 0 ? dot : entry.name.length);
  return undefined;
}

// a name that does not work stays where it was typed, with what is wrong about it
function renameField(entry) {
  let done = false;
  const finish = async keep => {
    if (done) return;
    done = true;
    const name = input.value, held = document.activeElement === input;
    try {
      if (keep && name !== entry.name) await rename(entry, name, () => { list.editing = null; });
    } catch (error) {
      done = false;
      problem.textContent = explain(error);
      input.setAttribute("aria-invalid", "true");
      return;
    }
    list.editing = null;
    redrawRows();
    if (held || document.activeElement === document.body) list.box.focus({preventScroll: true});
  };
  const problem = h("p.problem", {role: "alert", id: "rename-problem"});
  const input = h("input.rename", {
    value: entry.name,
    maxLength: 255,
    "aria-label": t("New name"),
    "aria-describedby": "rename-problem",
    spellcheck: false,
    autocomplete: "off",
    onblur: () => finish(true),
    oninput: () => problem.replaceChildren(),
    onkeydown: event => {
      event.stopPropagation();
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") finish(false);
    }
  });
  return h("div.renaming", {}, input, problem);
}

async function rename(entry, name, then = () => {}) {
  checkName(name);
  if (name === entry.name) return;
  const target = join(parentOf(entry.path), name);
  const {seq} = await api("POST", "move", {items: [{from: entry.path, to: target}]}).catch(sayTaken);
  then();
  offerUndo(t("Renamed to “{name}”", {name}), seq);
  await refresh();
}

// ---- renaming many: each new name is seen before anything happens

function renameMany(items) {
  items.sort((a, b) => list.known.get(a.node) - list.known.get(b.node));       // numbers follow what is seen
  const text = (label, about) => field(label, {required: false, autocomplete: "off", ...about});
  const said = h("p", {role: "status"}), rows = h("ul.renames", {tabIndex: 0, "aria-label": t("New names")});
  const way = choice("How", "way", {find: "Find and replace", number: "Number"}), parts = [
    [text(t("Find"), {name: "find", autofocus: true}), text(t("Replace with"), {name: "by"}),
     tick(t("Regular expression"), {name: "regular"})],
    [text(t("Pattern; # is where the number goes"), {name: "pattern"}),
      text(t("First number"), {name: "first", type: "number", value: 1}),
     tick(t("Keep the endings of files"), {name: "endings", checked: true})]].map(some => h("div.way", {}, some));
  let good;
  const draw = () => {
    let all = [], wrong = "";
    try {
      all = judgeNames(items, newNames(items, Object.fromEntries(new FormData(form))));
    } catch {
      wrong = t("This is not a regular expression.");
    }
    const bad = all.filter(one => one.bad);
    good = all.filter(one => !one.bad && one.from !== one.to);
    parts.forEach((part, n) => { part.hidden = n !== way.selectedIndex; });
    find(".primary", form).disabled = wrong || bad.length || !good.length;
    said.textContent = wrong || (bad.length ? plural(bad.length, "{n} name does not work", "{n} names do not work")
      : plural(good.length, "{n} name changes", "{n} names change"));
    all = [...bad, ...good];
    rows.replaceChildren(...all.slice(0, 200).map(({from, name, bad}) => h("li", {}, h("bdi.soft", {}, nameOf(from)),
      h("span", {}, "→ ", h("bdi", {}, name), bad && h("div.problem", {}, bad)))));
    if (all.length > 200) rows.append(h("li.soft", {}, t("and {n} more", {n: all.length - 200})));
  };
  const done = askForm(t("Rename {n} items", {n: items.length}), [way, parts, said, rows], t("Rename"),
    () => renameAll(good));
  const form = way.form;
  form.oninput = draw;
  draw();
  return done;
}

// throws for what is no regular expression
function newNames(items, {way, find, by, regular, pattern, first, endings}) {
  const what = regular ? new RegExp(find, "gu") : find;
  return items.map((entry, n) => way === "number"
    ? pattern.replace(/#+/, marks => String(n + +first).padStart(marks.length, "0"))
      + (endings && entry.kind === "file" ? splitName(entry.name)[1] : "")
    : find ? entry.name.replaceAll(what, regular ? by : () => by) : entry.name);
}

// [{from, to, name, bad}]: where each goes, and in words what is wrong with that
function judgeNames(items, names) {
  const all = items.map(({path}, n) => ({from: path, to: join(parentOf(path), names[n]), name: names[n]})), times = {};
  const own = new Set(items.map(entry => entry.path)), taken = new Set(list.entries.map(entry => entry.path));
  for (const {to} of all) times[to] = (times[to] || 0) + 1;
  for (const one of all) one.bad = !isName(one.name) ? t("cannot be a name") : times[one.to] > 1 ? t("twice the same")
    : one.to === one.from ? "" : own.has(one.to) ? t("another one still has it: rename in two steps")
    : taken.has(one.to) ? t("is there already") : "";
  return all;
}

// one step, which the server makes as a whole or not at all: to it a name that another of them still has is taken
async function renameAll(all) {
  const {seq} = await api("POST", "move", {items: all.map(({from, to}) => ({from, to}))}).catch(sayTaken);
  offerUndo(plural(all.length, "{n} item renamed", "{n} items renamed"), seq);
  await refresh();
}

// ---- moving and copying

const clip = {verb: "", ids: new Set(), items: []};

function putOnClip(verb, items) {
  Object.assign(clip, {verb, items, ids: new Set(items.map(entry => entry.node))});
  redrawRows();
  clearSelection();
  toast(
    verb === "move"
      ? t("{what} ready to be moved: paste it where it belongs.", {what: namesOf(items)})
      : t("{what} ready to be copied: paste it where you want it.", {what: namesOf(items)})
  );
}

async function pasteClip() {
  const before = {...clip};
  if (clip.verb === "move") Object.assign(clip, {verb: "", items: [], ids: new Set()});
  try {
    await transfer(before.verb, before.items, view.path);
  } catch (error) {
    Object.assign(clip, before);
    throw error;
  }
}

async function moveTo(items, verb) {
  const target = await chooseCollection(
    verb === "move" ? t("Move {what} to", {what: namesOf(items)}) : t("Copy {what} to", {what: namesOf(items)}),
    verb === "move" ? t("Move here") : t("Copy here"),
    view.kind === "files" ? view.path : parentOf(items[0].path),
    items
  );
  if (target !== undefined) await transfer(verb, items, target);
}

// bring items into a collection; names that are taken are settled first
async function transfer(verb, items, target) {
  if (verb === "move") items = items.filter(entry => parentOf(entry.path) !== target);
  if (!items.length) return;
  const pairs = items.map(entry => ({from: entry.path, to: join(target, entry.name)}))
    .map(pair => pair.from === pair.to ? {...pair, clash: "keep"} : pair);         // a copy beside the original
  const send = some => some.length ? api("POST", verb, {items: some}) : null;
  const done = await send(pairs).catch(async error => {
    if (error.code !== "precondition-failed") throw error;
    return send(await settle(pairs));
  });
  clearSelection();
  const words = {what: namesOf(items)};
  if (done) offerUndo(verb === "move" ? t("{what} moved", words) : t("{what} copied", words), done.seq);
  await refresh();
}

function splitName(name) {
  const dot = name.lastIndexOf(".");
  return dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ""];
}

// for each name that is taken at the target: keep both, replace or skip?
async function settle(pairs) {
  const {taken} = await api("POST", "taken", {paths: pairs.filter(pair => !pair.clash).map(pair => pair.to)});
  const clashes = new Set(taken), settled = [];
  let all = "", more = clashes.size;
  for (const pair of pairs) {
    if (!clashes.has(pair.to)) settled.push(pair);
    else {
      const answer = all ? {how: all} : await askClash(nameOf(pair.to), --more);
      if (answer.all) all = answer.how;
      if (answer.how !== "skip") settled.push({...pair, clash: answer.how});
    }
  }
  return settled;
}

// more: how many further clashes may follow, undefined if nobody knows; dismissing it skips
async function askClash(name, more) {
  const answer = await sheet(t("“{name}” exists already", {name}), close => {
    const all = h("input", {type: "checkbox", checked: false});
    const choice = (label, how, about) => button(label, () => close({how, all: all.checked}), about);
    return [
      h("p", {}, t("What should happen with the new one?")),
      more === 0 ? null : h("label.tick", {},
            all,
            more ? plural(more, "Do the same for {n} more", "Do the same for {n} more")
              : t("Do the same for all others")
          ),
      buttonsRow(
        choice(t("Skip"), "skip"),
        choice(t("Replace"), "replace"),
        choice(t("Keep both"), "keep", {className: "primary", autofocus: true})
      )
    ];
  });
  return answer || {how: "skip", all: false};
}

// a sheet to walk the collections and choose one
function chooseCollection(title, yes, from, items = []) {
  const moving = new Set(items.map(entry => entry.path));
  return sheet(title, close => {
    const box = h("div.walk"),
      crumbs = h("nav.crumbs"),
      choose = button(yes, () => close(here), {className: "primary"});
    let here = from;
    const enter = path =>
      attempt(async () => {
        const {children} = await load(path);
        here = path;
        crumbs.replaceChildren(
          ...crumbsOf(path, () => "#").flatMap((part, n) => (n ? [h("span.slash", {}, "/"), part] : [part]))
        );
        const inside = sortEntries(children.filter(entry => entry.kind === "collection" && !moving.has(entry.path)));
        box.replaceChildren(
          ...inside.map(entry =>
            h("button.item", {type: "button", onclick: () => enter(entry.path)},
              icon("collection"),
              h("bdi", {}, entry.name)
            )
          ),
          ...(inside.length ? [] : [h("p.soft", {}, t("No folders in here"))])
        );
        choose.disabled = items.length > 0 && items.every(entry => parentOf(entry.path) === here);
      });
    const make = button(
      t("New folder"),
      async () => {
        const made = await makeCollection(here);
        if (made) enter(made.path);
      },
      {className: "quiet"}
    );
    enter(from);
    crumbs.onclick = event => {
      event.preventDefault();
      const {path} = event.target.closest("a")?.dataset || {};
      if (path !== undefined) enter(path);
    };
    return [crumbs, box, buttonsRow(make, button(t("Cancel"), () => close()), choose)];
  });
}

async function showInFolder(entry) {
  await go(addressOf(parentOf(entry.path)));
  const index = list.known.get(entry.node);
  if (index !== undefined) { pick(index); setCursor(index); }
}

// ---- upload queue: small files by one PUT each, larger ones by tus, which goes on where it stopped

const SMALL = 4 << 20, PART = 16 << 20, AT_ONCE = 4;
const queue = {
  items: [], next: 0, running: 0, paused: false, all: "", asking: Promise.resolve(), box: null, failed: 0,
  delayed: new Set(), pictures: Promise.resolve(), places: new Map(), base: "", pace: null, percent: null, phase: ""
};
const PARTS = "uploads";               // what localStorage remembers of unfinished uploads: {fingerprint: id}

// about: what makes the chooser a special one
async function chooseFiles(about, target) {
  if (target === undefined) await ensureFiles();
  const input = h("input", {type: "file", multiple: true, hidden: true, ...about, onchange: () => {
    const files = [...input.files], here = target ?? view.path;
    const place = file => ({file, path: join(here, file.webkitRelativePath || file.name)});
    attempt(() => addUploads(about.capture ? nameTaken(files) : files.map(place)));
    input.remove();
  }});
  document.body.append(input);
  input.click();
}

// cameras and clipboards call everything image.png or image.jpg: such get a name of kind and time
function nameTaken(files) {
  return files.map(file => {
    const [, suffix] = file.name.match(/^(?:image|photo|video)(\.\w+)$/i) || [];
    const what = /^video/.test(file.type) ? t("Video") : suffix === ".png" ? t("Screenshot") : t("Photo");
    // Swedes write 2026-11-25 14:05:33
    const when = new Date(file.lastModified).toLocaleString("sv").replace(/:/g, ".");
    const name = suffix ? what + " " + when + suffix : file.name;
    return {file, path: join(view.path, name), how: suffix && "keep"};
  });
}

// what was dropped, collections walked to their end; must begin while the drop event is being handled
async function readDrop(transfer, target) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry());
  if (!entries.some(Boolean)) return [...transfer.files].map(file => ({file, path: join(target, file.name)}));
  const found = [];
  for (const entry of entries.filter(Boolean)) await walkDropped(entry, target, found);
  return found;
}

async function walkDropped(entry, target, found) {
  const path = join(target, entry.name);
  if (entry.isFile) return found.push({path, file: await new Promise((done, fail) => entry.file(done, fail))});
  const reader = entry.createReader(), before = found.length;
  for (;;) {                           // a reader gives a hundred at a time
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    for (const one of some) await walkDropped(one, path, found);
  }
  return found.length === before && found.push({path, file: null});
}

// found: [{path, file}]; a collection that holds nothing has no file
async function addUploads(found) {
  queue.places = new Map();
  queue.base = inFiles() ? view.path : "";
  if (inFiles()) queue.places.set(view.path, byName(list.entries));
  found = await fitting(found.map(one => ({...one, size: one.file ? one.file.size : 0})));
  if (!found.length) return;
  if (!busy()) Object.assign(queue, {items: [], next: 0, all: "", failed: 0, pace: null});
  for (const one of found) queue.items.push({...one, sent: 0, state: "waiting", tries: 0, more: found.length > 1});
  queue.box = null;
  showQueue();
  if (inFiles() && !list.entries.length) fillList([]);
  pump();
}

function pump() {
  while (!queue.paused && queue.running < AT_ONCE && queue.next < queue.items.length) {
    const item = queue.items[queue.next++];
    if (item.state === "waiting") runUpload(item);
  }
  updateQueue();
}

async function runUpload(item) {
  queue.running++;
  Object.assign(item, {state: "sending", error: ""});
  showItem(item);
  try {
    if (item.file && !item.how) await meet(item);
    if (item.state === "sending") await sendItem(item);
    if (item.state === "sending") finishItem(item, "done");
  } catch (error) {
    if (item.state === "sending") await failItem(item, error);
  }
  queue.running--;
  pump();
  if (!busy()) endQueue();
}

async function failItem(item, error) {
  if (error.code === "precondition-failed" && !item.how) {             // there is something that no list told of
    item.refused = true;
    return again(item);
  }
  if (item.file && (error.code === "network" || !(error instanceof Problem))
    && !await item.file.slice(0, 1).arrayBuffer().catch(() => null))
    error = trouble("", t("This file was changed since it was chosen. Choose it again."));
  if (item.state !== "sending") return undefined;
  if (["network", "busy", "offset", "paused"].includes(error.code)) {  // offset: the server still ends what was cut off
    item.state = "waiting";
    queue.delayed.add(item);
    queue.places.clear();
    if (error.code === "paused") return showItem(item);
    item.error = t("Waiting for the connection…");
    showItem(item);
    return setTimeout(() => wake(item), Math.min(30000, 1000 * 2 ** item.tries++));
  }
  queue.failed++;
  return finishItem(item, "failed", explain(error));
}

// when its time has come, or when the network is back
const wake = item => queue.delayed.delete(item) && again(item);

function again(item) {
  item.state = "waiting";
  queue.items.push(queue.items.splice(queue.items.indexOf(item), 1)[0]);
  queue.next = Math.max(0, queue.next - 1);
  pump();
}

// ---- before anything is sent: does it fit, and is it there already?

const isBelow = (path, place) => path.startsWith(place && place + "/");
const byName = entries => new Map(entries.map(entry => [entry.name.normalize(), entry]));

// what of this is to be uploaded: nothing starts that could not end
async function fitting(found) {
  const large = found.filter(one => one.size > me.most);
  if (large.length && !await tellUnfit(plural(large.length, "{n} file is too large", "{n} files are too large"),
    large.length < found.length,
    t("This server takes files of up to {size}.", {size: formatSize(me.most)}),
    namesSome(large))) return [];
  found = found.filter(one => one.size <= me.most);
  Object.assign(me, await api("GET", "account").catch(unless("network")));       // offline it is to wait, like all else
  const size = all => all.reduce((bytes, one) => bytes + one.size, 0), left = me.left === null ? Infinity : me.left;
  const begun = size(unfinished().filter(one => !one.upload));
  if (begun + size(found) <= left) return found;
  const fits = [];
  let need = begun, room = left - begun;
  for (const one of found) {
    const cost = one.size - await saved(one);
    need += cost;
    if (cost > room) continue;
    room -= cost;
    fits.push(one);
  }
  if (need <= left) return found;
  const values = {need: formatSize(need), left: formatSize(left), lack: formatSize(need - left)};
  const some = fits.some(one => one.size), rest = found.filter(one => !fits.includes(one));
  return await tellUnfit(t("Not enough room"), some,
    t("This needs {need}, but {left} is all that is left: {lack} is missing.", values),
    some ? t("There is no room for {names}.", {names: namesSome(rest)})
      : t("Delete something and empty the trash, or choose less.")) ? fits : [];
}

const namesSome = all =>
  all.slice(0, 20).map(one => quoted(nameOf(one.path))).join(", ") + (all.length > 20 ? " …" : "");

const tellUnfit = (title, others, ...texts) => sheet(title, close => [texts.map(text => h("p", {}, text)), buttonsRow(
  button(t(others ? "Cancel" : "Close"), () => close()),
  others && button(t("Upload the others"), () => close(true), {className: "primary", autofocus: true}))]);

// bytes that need no room: what is there would be replaced, and what was begun before is counted already
async function saved(one) {
  if (!one.file || readParts()[printOf(one)]) return one.size;
  const there = await lookFor(one.path);
  return there ? Math.min(there.size, one.size) : 0;
}

const lookFor = async path => (await holding(parentOf(path))).get(nameOf(path).normalize());

// what a collection holds, by name, asked for once
function holding(path) {
  if (!queue.places.has(path)) queue.places.set(path, lookInto(path));
  return queue.places.get(path);
}

// in what is not there nothing needs to be looked for
async function lookInto(path) {
  const here = queue.base, entries = [];
  if (path && isBelow(path, here)) {
    const entry = await lookFor(path);
    if (!entry || entry.kind === "file") return new Map();
  }
  for (let after = 0; after !== null;) {
    const {children = [], next = null} = await load(path, {after}).catch(unless("not-found")) || {};
    entries.push(...children);
    after = next;
  }
  return byName(entries);
}

// what stands where it would go: the same bytes need no sending, about others somebody has to decide
async function meet(item) {
  const there = item.refused ? await load(item.path) : await lookFor(item.path);
  if (!there) return;
  const same = await isSame(item, there);
  item.compared = 0;
  if (item.state !== "sending") return;
  // done: an earlier try did it, and its answer was lost
  if (same) finishItem(item, item.tries ? "done" : "there");
  else await settleUpload(item);
}

// proven by what the server knows of its pieces, one after the other; only a page in the clear has to go by size and
// time
async function isSame(item, there) {
  if (there.kind !== "file" || there.size !== item.size) return false;
  if (!crypto.subtle) return item.tries > 0 && Date.parse(there.mtime) === item.file.lastModified;
  const chunks = there.sha256 ? [[there.sha256, there.size]] : (await load(there.path, {chunks: true})).chunks;
  let at = 0;
  for (const [hash, size] of chunks) {
    if (queue.paused) throw trouble("paused");
    if (item.state !== "sending" || await hashOf(item.file.slice(at, at + size)) !== hash) return false;
    at += size;
    item.compared = at / item.size;
    updateQueue();
  }
  return at === item.size;
}

async function hashOf(blob) {
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return Array.from(new Uint8Array(digest), byte => byte.toString(16).padStart(2, "0")).join("");
}

// one question at a time, and none when the answer was given for all
async function settleUpload(item) {
  queue.asking = queue.asking.then(async () => {
    const {how, all} = queue.all ? {how: queue.all} : await askClash(nameOf(item.path), item.more ? undefined : 0);
    item.how = how;
    if (all) queue.all = how;
  });
  await queue.asking;
  if (item.how === "skip") finishItem(item, "skipped");
}

async function sendItem(item) {
  if (queue.paused) throw trouble("paused");
  if (!item.file) return api("POST", "make-collection", {path: item.path, parents: true}).catch(unless("exists"));
  const send = item.size > SMALL ? sendParts : sendWhole;
  const path = await send(item);
  if (path) queue.pictures = queue.pictures.then(() => depict(item.file, path)).catch(() => {});
  return undefined;
}

// both resolve to where the file is, as far as that is known
async function sendWhole(item) {
  const {file, path, how} = item, values = {mtime: file.lastModified, parents: 1, keep: how === "keep" && 1};
  const given = how ? {} : {"If-None-Match": "*"};
  const answer = await transmit(item, "PUT", apiAddress("files", path, values), file, given, 0);
  return JSON.parse(answer.responseText).path;
}

// a tus upload: made, or found again after a break, then part after part
async function sendParts(item) {
  const {path, how} = item, known = readParts(), print = printOf(item);
  let offset = known[print] ? await offsetOf(known[print]) : -1;
  let id = known[print];
  if (offset < 0) {
    const about = {path, mtime: item.file.lastModified, parents: "1", clash: how || "refuse"};
    const announced = {"Upload-Length": item.size, "Upload-Metadata": metadata(about)};
    const answer = await transmit(item, "POST", PREFIX + "/tus", null, announced, 0);
    [id, offset] = [nameOf(answer.getResponseHeader("Location")), 0];
    saveParts({...readParts(), [print]: id}); // anew: other uploads have begun since
  }
  item.upload = id;
  if (offset) queue.pace = null;                 // what is there already tells nothing about the pace
  item.sent = offset;
  while (offset < item.size) {
    const part = item.file.slice(offset, offset + PART);
    const answer = await transmit(item, "PATCH", PREFIX + "/tus/" + id, part, {"Upload-Offset": offset}, offset);
    offset = Number(answer.getResponseHeader("Upload-Offset"));
    item.tries = Math.min(item.tries, 1);        // it gets on: the next break waits no longer than the first
  }
  return how === "keep" ? "" : path;
}

const printOf = ({file, how, path}) => [me.name, path, file.size, file.lastModified, how].join("|");
const metadata = values => Object.entries(values).map(([name, value]) =>
  name + " " + btoa(String.fromCharCode(...new TextEncoder().encode(value)))).join(",");
const readParts = () => JSON.parse(localStorage.getItem(PARTS) || "{}");
const saveParts = parts => localStorage.setItem(PARTS, JSON.stringify(parts));
function forgetMe() {
  for (const key of [PARTS, BROKEN]) localStorage.removeItem(key);
  indexedDB.deleteDatabase("thumbnails");        // where an older page kept them
}

// where an upload stands, -1 if the server does not know it any more
async function offsetOf(id) {
  const answer = await fetch(PREFIX + "/tus/" + id, {method: "HEAD", headers: {...HEADERS, ...TUS}})
    .catch(() => ({status: 502}));
  if (answer.ok) return Number(answer.headers.get("Upload-Offset"));
  if ([404, 410].includes(answer.status)) return -1;
  if (answer.status !== 401) throw readProblem(answer.status, "");
  await logInAgain();
  return offsetOf(id);
}

const TUS = {"Tus-Resumable": "1.0.0"};
const BODIES = {
  POST: TUS,
  PATCH: {...TUS, "Content-Type": "application/offset+octet-stream"},
  PUT: {"Content-Type": "application/octet-stream"}
};

// one request with progress, which fetch cannot show
function transmit(item, method, address, body, headers, from) {
  return new Promise((done, fail) => {
    const abort = () => fail(new DOMException("", "AbortError"));
    if (item.state !== "sending") return abort();          // paused between two requests
    const request = (item.request = new XMLHttpRequest());
    request.open(method, address);
    const fields = Object.entries({...HEADERS, ...BODIES[method], ...headers});
    for (const [name, value] of fields) request.setRequestHeader(name, value);
    request.upload.onprogress = event => {
      item.sent = from + event.loaded;
      updateQueue();
    };
    request.onload = () => {
      if (request.status < 300) return done(request);
      const problem = readProblem(request.status, request.responseText);
      return problem.code === "unauthenticated"
        ? logInAgain().then(() => fail(trouble("network")), fail)
        : fail(problem);
    };
    request.onerror = () => fail(trouble("network"));
    request.onabort = abort;
    request.send(body);
  });
}

function forgetPart(print) {
  const parts = readParts();
  delete parts[print];
  saveParts(parts);
}

function finishItem(item, state, error = "") {
  if (item.size > SMALL && state !== "failed") forgetPart(printOf(item));
  queue.delayed.delete(item);
  Object.assign(item, {state, error, sent: state === "done" ? item.size : item.sent});
  showItem(item);
  if (state === "done" && inFiles() && isBelow(item.path, view.path)) refreshSoon();
}

const refreshSoon = soon(refresh, 500, true);

function cancelItem(item) {
  const sending = item.state === "sending";
  finishItem(item, "cancelled");
  if (sending && item.request) item.request.abort();
  if (item.upload)
    fetch(PREFIX + "/tus/" + item.upload, {method: "DELETE", headers: {...HEADERS, ...TUS}}).catch(() => {});
  updateQueue();
}

function retryItem(item) {
  if (item.state === "failed") queue.failed--;
  Object.assign(item, {error: "", sent: 0, tries: 0});
  again(item);
}

function pauseQueue() {
  queue.paused = !queue.paused;
  if (!queue.paused) queue.delayed.forEach(wake);
  else for (const item of queue.items) if (item.state === "sending" && item.request) {
    item.state = "waiting";
    item.tries++;
    item.request.abort();
    queue.delayed.add(item);
    showItem(item);
  }
  pump();
}

// ---- what the end of a page broke off: said by the next one, which cannot open the files again by itself

const BROKEN = "broken";               // what localStorage remembers of what had not begun: {name, path, more}

function noteBroken() {
  const [first, ...others] = unfinished().filter(one => one.file && !one.upload);
  if (first) localStorage.setItem(BROKEN, JSON.stringify({name: me.name, path: first.path, more: others.length}));
}

// uploads of other tabs go on there: whoever is at work answers
const tabs = "BroadcastChannel" in window ? new BroadcastChannel("uploads of " + PREFIX) : null;
const elsewhere = new Set();
if (tabs) tabs.onmessage = ({data}) => data ? data.forEach(id => elsewhere.add(id))
  : tabs.postMessage(unfinished().map(one => one.upload).filter(Boolean));

async function showBroken() {
  const {name, path = "", more = 0} = JSON.parse(localStorage.getItem(BROKEN) || "{}");
  const parts = Object.entries(readParts()).filter(([print]) => print.startsWith(me.name + "|"));
  if (!parts.length && name !== me.name) return;
  if (tabs) tabs.postMessage(null);
  await new Promise(done => setTimeout(done, 300));
  const rows = [];
  for (const [print, id] of parts) {
    if (elsewhere.has(id) || queue.items.length) continue;
    const offset = await offsetOf(id), [, path, size] = print.split("|");
    offset < 0 ? forgetPart(print) : rows.push(brokenRow(print, id, path, offset / size));
  }
  if (name === me.name && !elsewhere.size) {
    localStorage.removeItem(BROKEN);
    const words = t(more ? "{name} and {n} more were not sent." : "{name} was not sent.",
      {name: quoted(nameOf(path)), n: more});
    rows.push(h("li.broken", {}, h("span.state", {}, words)));
  }
  const box = find(".queue");
  if (!rows.length || !box || queue.items.length) return;
  box.hidden = false;
  queue.box = null;
  const title = h("div.title", {}, h("strong", {}, t("An upload was broken off")),
    button(t("Close"), () => { box.hidden = true; }, {className: "quiet"}),
    h("span.soft", {}, t("Choose the same files again: it goes on, and what is there is not sent twice.")));
  box.replaceChildren(title, h("ul", {}, rows));
}

function brokenRow(print, id, path, share) {
  const row = h("li.broken", {}, h("bdi", {title: path}, nameOf(path)),
    button(t("Choose again"), () => chooseFiles({}, parentOf(path)), {className: "quiet"}),
    button(t("Give up"), () => {
      forgetPart(print);
      fetch(PREFIX + "/tus/" + id, {method: "DELETE", headers: {...HEADERS, ...TUS}}).catch(() => {});
      row.remove();
    }, {className: "quiet"}),
    h("span.state", {}, t("{n} % are there", {n: Math.floor(100 * share)})));
  return row;
}

function endQueue() {
  queue.all = "";
  updateQueue();
  updateQuota();
  if (inFiles()) refreshSoon();
  if (!queue.failed) setTimeout(() => busy() || queue.failed || hideQueue(), 10000);
}

// ---- the panel of the queue

const busy = () => queue.running > 0 || queue.delayed.size > 0 || queue.next < queue.items.length;

function showQueue() {
  const box = find(".queue");
  if (!box || queue.box === box) return;
  box.hidden = !queue.items.length;
  Object.assign(queue, {
    box, title: h("strong"), detail: h("span.soft"),
    said: h("span.unseen", {role: "status"}),    // numbers that change all the time are not read out
    bar: h("progress", {max: 1, value: 0, "aria-label": t("All uploads")}),
    retry: button(t("Retry all"), () => queue.items.filter(item => item.state === "failed").forEach(retryItem)),
    pause: button("", pauseQueue, {className: "quiet"}),
    stop: button("", () => busy() ? unfinished().forEach(cancelItem) : hideQueue(), {className: "quiet"}),
    list: h("ul")});
  box.replaceChildren(h("div.title", {},
    ["title", "said", "retry", "pause", "stop", "detail"].map(part => queue[part])), queue.bar, queue.list);
  queue.items.filter(item => item.row).slice(-50).forEach(item => queue.list.append(item.row));
  updateQueue();
}

function hideQueue() {
  Object.assign(queue, {items: [], next: 0, failed: 0});
  find(".queue").hidden = true;
}

const STATES = {waiting: "Waiting", sending: "", done: "Done", there: "Already there", failed: "Failed",
  skipped: "Skipped", cancelled: "Cancelled"};
// what can still be done about it
const OPEN = {failed: "Retry", cancelled: "Retry", waiting: "Cancel", sending: "Cancel"};

const unfinished = () => queue.items.filter(item => OPEN[item.state] === "Cancel");

// the row of a file is made when its turn comes, so that a hundred thousand cost nothing
function showItem(item) {
  if (!item.row) {
    const name = nameOf(item.path), words = h("span.state"),
      meter = h("progress", {max: 1, value: 0, "aria-label": name});
    const act = button("", () => OPEN[item.state] === "Retry" ? retryItem(item) : cancelItem(item),
      {className: "quiet"});
    Object.assign(item, {words, meter, act, row: h("li", {}, h("bdi", {title: item.path}, name), words, act, meter)});
    queue.list.prepend(item.row);
    const finished = [...queue.list.children].slice(50).reverse().find(row => /done|there|skipped/.test(row.className));
    if (finished) finished.remove();
  }
  item.row.className = item.state;
  item.act.hidden = !OPEN[item.state];
  item.act.textContent = t(OPEN[item.state] || "");
  drawItem(item);
  updateQueue();
}

function drawItem(item) {
  item.meter.value = item.compared || item.sent / item.size || 0;
  item.words.textContent = item.state !== "sending" ? item.error || t(STATES[item.state])
    : item.compared ? t("Comparing…")
    : item.sent && item.size > SMALL ? t("{sent} of {size}", {sent: formatSize(item.sent), size: formatSize(item.size)})
    : formatSize(item.size);
}

// a tab in the background draws no frames, but its title is looked at
let drawing = 0, ticking = 0;
function updateQueue() {
  drawing = drawing || setTimeout(() => { drawing = 0; drawQueue(); }, 60);
}

function drawQueue() {
  const files = queue.items.filter(item => item.file), rest = busy(), count = {},
    {box, bar, pause, title, detail, said, retry, stop} = queue;
  let sent = 0, total = 0, bytes = 0;
  for (const item of files) {
    count[item.state] = (count[item.state] || 0) + 1;
    if (item.state === "sending" && item.row) drawItem(item);
    if (/there|skipped|cancelled/.test(item.state)) continue;
    total += item.size + 1000; // the smallest files take time, too
    sent += item.state === "done" ? item.size + 1000 : item.sent;
    bytes += item.sent;
  }
  const phase = !rest ? "ended" : queue.paused ? "paused" : queue.running ? "sending" : "waiting";
  queue.percent = rest ? Math.floor(100 * sent / total) || 0 : null;
  if (view.title) drawTitle();
  clearTimeout(ticking);
  if (rest) ticking = setTimeout(updateQueue, 1000);
  if (!box || !queue.items.length) return;
  bar.value = total ? sent / total : 1;
  bar.hidden = pause.hidden = !rest;
  retry.hidden = !queue.failed;
  pause.textContent = t(queue.paused ? "Resume" : "Pause");
  stop.textContent = t(rest ? "Cancel" : "Close");
  title.textContent = queueWords(phase, count, files.length);
  detail.textContent = phase === "sending" ? paceWords(sent, bytes, total) : "";
  if (phase !== "sending") queue.pace = null;
  if (phase !== queue.phase) said.textContent = title.textContent;
  queue.phase = phase;
}

function queueWords(phase, count, n) {
  const values = {done: (count.done || 0) + (count.there || 0), n, percent: queue.percent};
  if (phase === "sending") return t("Uploading: {done} of {n}, {percent} %", values);
  if (phase === "paused") return t("Paused: {done} of {n} uploaded", values);
  if (phase === "waiting") return t("No connection: {done} of {n} uploaded", values);
  return [
    queue.failed && plural(queue.failed, "{n} upload failed", "{n} uploads failed"),
    count.done && plural(count.done, "{n} file uploaded", "{n} files uploaded"),
    count.there && t("{n} already there", {n: count.there})
  ].filter(Boolean).join(", ") || t(n ? "Nothing uploaded" : "Done");
}

// the pace and the time left, smoothed over some ten seconds; nothing before it means something
function paceWords(sent, bytes, total) {
  const now = performance.now(), pace = queue.pace = queue.pace || {now, sent, ticks: 0, speed: 0},
    seconds = (now - pace.now) / 1000;
  if (seconds >= 1) {
    const share = pace.ticks++ ? 1 - Math.exp(-seconds / 8) : 1, gain = Math.max(0, sent - pace.sent) / seconds;
    Object.assign(pace, {now, sent, speed: pace.speed + share * (gain - pace.speed)});
  }
  if (pace.ticks < 3 || pace.speed < 1) return "";
  const left = (total - sent) / pace.speed, n = Math.round(left / 60);
  return t("{size}/s, {time}",
    {size: formatSize(pace.speed * bytes / sent), time: left < 45 ? t("less than a minute left")
    : n < 90 ? plural(n || 1, "{n} minute left", "{n} minutes left") : t("{n} hours left", {n: Math.round(n / 60)})});
}

// ---- dragging: files from outside, entries within

const MARK = "application/x-cloudserver";

function dropTarget(event) {
  const crumb = event.target.closest && event.target.closest(".crumbs a[data-path]");
  if (crumb) return {path: crumb.dataset.path, element: crumb};
  const row = event.target.closest && event.target.closest(".rows .row"), entry = row && list.entries[indexAt(row)];
  if (entry && entry.kind === "collection" && view.kind === "files") return {path: entry.path, element: row};
  return view.kind === "files" ? {path: view.path, element: null} : null;
}

function onDragStart(event) {
  const index = event.target.closest ? indexAt(event.target) : -1;
  if (index < 0 || !me.name) return;
  if (!list.selected.has(list.entries[index].node)) pick(index);
  const items = selection();
  event.dataTransfer.setData(MARK, "1");
  event.dataTransfer.effectAllowed = "copyMove";
  if (items.length === 1 && items[0].kind === "file")
    event.dataTransfer.setData(
      "DownloadURL",
      "application/octet-stream:" + items[0].name + ":" + location.origin + contentAddress(items[0])
    );
  const ghost = h("div.ghost", {}, namesOf(items));
  document.body.append(ghost);
  event.dataTransfer.setDragImage(ghost, -12, -12);
  setTimeout(() => ghost.remove());
}

function onDragOver(event) {
  const types = event.dataTransfer.types,
    files = types.includes("Files"),
    inside = types.includes(MARK),
    target = me.name && dropTarget(event);
  unmarkDrop();
  if (!files && !inside) return;
  event.preventDefault();
  const useful = target && !document.querySelector("dialog") &&
    (files || (target.element && !selection().some(entry => entry.path === target.path)));
  event.dataTransfer.dropEffect = !useful ? "none" : files || event.ctrlKey || event.altKey ? "copy" : "move";
  if (useful && target.element) target.element.classList.add("over");
  else if (useful) {
    document.body.classList.add("dropping");
    find("main").dataset.drop = t("Drop it to upload it to {place}", {place: nameOf(view.path) || t("Files")});
  }
}

function unmarkDrop() {
  document.body.classList.remove("dropping");
  for (const element of document.querySelectorAll(".over")) element.classList.remove("over");
}

function onDrop(event) {
  const types = event.dataTransfer.types,
    target = me.name && dropTarget(event);
  unmarkDrop();
  if (!types.includes("Files") && !types.includes(MARK)) return;
  event.preventDefault();
  if (!target || document.querySelector("dialog")) return;
  if (types.includes("Files")) {
    const reading = readDrop(event.dataTransfer, target.path);
    attempt(async () => addUploads(await reading));
  } else if (target.element)
    attempt(() => transfer(event.ctrlKey || event.altKey ? "copy" : "move", selection(), target.path));
}

function onPaste(event) {
  if (event.target.closest("input, textarea, [contenteditable], dialog") || !inFiles()) return;
  const files = [...event.clipboardData.files];
  if (files.length) attempt(() => addUploads(nameTaken(files)));
  else if (clip.ids.size) attempt(pasteClip);
  else return;
  event.preventDefault();
}

// ---- versions of a file

const versionsAddress = (path, values = {}) => PREFIX + "/versions/" + encodePath(path) + queryOf(values);

async function showVersions(address) {
  const path = decodePath(address), turn = view.turn, asked = new URLSearchParams(location.search),
    id = asked.get("version");
  const [{versions}, entry] = await Promise.all([api("GET", "versions/" + encodePath(path)), load(path)]);
  if (turn !== view.turn) return;
  Object.assign(view, {kind: "versions", path, at: null});
  setTitle(t("Versions of {name}", {name: nameOf(path)}));
  const crumbs = crumbsOf(path, addressOf);
  crumbs.at(-1).removeAttribute("aria-current");
  setCrumbs(...crumbs, h("span", {"aria-current": "page"}, t("Versions")));
  setBar(h("span.count", {}, plural(versions.length, "{n} version", "{n} versions")));
  const at = id ? versions.findIndex(one => one.version === id) : 0,
    held = document.activeElement.closest(".versions .steps, .versions nav");
  const look = await lookAtVersion(entry, versions, at, asked.get("with"));
  if (turn !== view.turn) return;
  setContent(h("div.versions", {},
    h("ol.steps", {}, versions.map((version, n) => versionRow(path, version, n, n === at))), look));
  if (held) find(".versions " + (held.tagName === "NAV" ? "nav" : "ol") + " [aria-current]").focus();
  if (id && isPhone.matches) look.scrollIntoView();
}

function versionRow(path, {version, at, size, account, device, name}, n, chosen) {
  const restore = async () => {
    const {seq} = await api("POST", "versions/restore", {path, version});
    offerUndo(t("This version is the present one now; the others stay."), seq);
    await show();
  };
  const pin = async name => {
    await api("POST", "versions/pin", {path, version, name});
    show();
    return true;
  };
  const keep = () => askForm(t("Keep for good"), [nameInput(t("Under the name"))], t("Keep"),
    values => pin(values.name),
    t("A version with a name is never removed by itself."));
  return h("li", {},
    h("div.what", {},
      link(longTime(at), versionsAddress(path, {version}), {"aria-current": chosen ? "true" : null}),
      n ? null : h("span.tag", {}, t("Now")),
      name && h("span.tag", {}, name),
      h("div.soft", {}, dotted(formatSize(size), account, deviceName(device)))
    ),
    h("div.acts", {},
      h("a.button", {href: apiAddress("content", path, {version}), download: ""}, t("Download")),
      n ? button(t("Restore"), () => attempt(restore)) : null,
      name ? button(t("Let go"), () => attempt(() => pin(null))) : button(t("Keep for good"), keep)
    )
  );
}

// one version as the preview would show it, or line by line beside another
async function lookAtVersion(entry, versions, at, against) {
  const one = versions[at], older = versions[at + 1];
  if (!one) return h("p.soft", {}, t(PROBLEMS["not-found"]));
  const as = ({version, size}) => ({...entry, size, version, as: {version}});
  const ways = [[null, t("The text")], older && ["before", t("What changed"), older, one],
                at > 0 && ["now", t("Compared with now"), one, versions[0]]].filter(Boolean);
  const way = ways.find(([name]) => name === against) || ways[0];
  const part = way[2] ? await compareVersions(way.slice(2).map(as)) : await lookAt(as(one));
  return h("section.preview.look", {"aria-label": t("Preview")},
    ways[1] && (way[2] || part.source) && h("nav", {"aria-label": t("View")}, ways.map(some => h("a.tab", {
      href: versionsAddress(entry.path, {version: one.version, with: some[0]}),
      "aria-current": some === way ? "page" : null}, some[1]))),
    h("div.body", {}, part));
}

async function compareVersions(two) {
  const [old, now] = await Promise.all(two.map(one => readText(one)));
  return old && now ? diffView(old.text, now.text) : noLook(two[1]);
}

// ---- what differs between two texts, line by line

const DIFF_MOST = 2000;                // lines; beyond that nobody would read it

const linesOf = text => text ? text.replace(/\r?\n$/, "").split(/\r?\n/) : [];

// the shortest way from the lines a to the lines b (Myers 1986): runs [" ", "-" or "+", lines]; null if they differ
// too much
function diffLines(a, b) {
  let top = 0, x = a.length, y = b.length;
  while (top < x && top < y && a[top] === b[top]) top++;
  while (x > top && y > top && a[x - 1] === b[y - 1]) { x--; y--; }
  const most = Math.min(x + y - 2 * top, DIFF_MOST), mid = most + 1, far = new Int32Array(2 * mid + 1).fill(top),
    kept = [];
  const isDown = (far, k, d) => k === -d || k !== d && far[mid + k - 1] < far[mid + k + 1];
  // far[mid + k]: how far along a the diagonal k = i - j is reached
  for (let d = 0; d <= most; d++) {
    kept.push(far.slice());
    for (let k = -d; k <= d; k += 2) {
      let i = isDown(far, k, d) ? far[mid + k + 1] : far[mid + k - 1] + 1;
      while (i < x && i - k < y && a[i] === b[i - k]) i++;
      far[mid + k] = i;
      if (i >= x && i - k >= y) return wayBack(d);
    }
  }
  return null;

  function wayBack(d) {
    const runs = [], say = (sign, line) => {
      if (!runs.length || runs.at(-1)[0] !== sign) runs.push([sign, []]);
      runs.at(-1)[1].push(line);
    };
    for (let n = a.length; n > x; n--) say(" ", a[n - 1]);
    for (let i = x, j = y; d >= 0; d--) {
      const far = kept[d], down = isDown(far, i - j, d), from = far[mid + i - j + (down ? 1 : -1)] + (down ? 0 : 1);
      for (; i > from; j--) say(" ", a[--i]);
      if (d) down ? say("+", b[--j]) : say("-", a[--i]);
    }
    while (top) say(" ", a[--top]);
    return runs.reverse().map(([sign, lines]) => [sign, lines.reverse()]);
  }
}

function diffView(old, now) {
  const runs = diffLines(linesOf(old), linesOf(now));
  const marked = (sign, lines) => raw(lines.map(line => sign + " " + line + "\n").join(""));
  if (!runs) return h("p.empty", {}, t("These two are too different to be compared line by line."));
  const count = sign => runs.reduce((sum, [one, lines]) => sum + (one === sign && lines.length), 0);
  const rows = runs.map(([sign, lines], n) => {
    if (sign === "+") return h("ins", {}, h("span.unseen", {}, t("Added:")), marked(sign, lines));
    if (sign === "-") return h("del", {}, h("span.unseen", {}, t("Removed:")), marked(sign, lines));
    const from = n ? 3 : 0, to = lines.length - (runs[n + 1] ? 3 : 0), same = lines.slice(from, to);
    return same.length < 2 ? marked(sign, lines) : [marked(sign, lines.slice(0, from)),
      h("details", {}, h("summary", {}, plural(same.length, "{n} line unchanged", "{n} lines unchanged")),
        marked(sign, same)),
      marked(sign, lines.slice(to))];
  });
  return h("div.diff", {tabIndex: 0},
    h("p", {}, t("Lines added: {added}, removed: {removed}", {added: count("+"), removed: count("-")})), rows);
}

// ---- trash

async function showTrash() {
  const turn = view.turn, {items, next} = await api("GET", "trash");
  if (turn !== view.turn) return;
  const same = view.kind === "trash" && list.box && list.box.isConnected;
  enterView("trash", t("Trash"));
  if (!same) setContent(h("p.hint", {},
    t("Deleted things stay here until their time is over or the trash is emptied.")),
    ...makeList({columns: ["deleted", "size"], sortable: false, empty: () => h("p.big", {}, t("The trash is empty"))}));
  fillList(items);
  let entries = items;
  for (let before = next; before !== null;) {
    const more = await api("GET", "trash", {before, limit: 10000});
    if (turn !== view.turn) return;
    fillList(entries = entries.concat(more.items));
    before = more.next;
  }
}

async function restoreItems(items) {
  const {seq, paths} = await api("POST", "trash/restore", {nodes: items.map(entry => entry.node)});
  clearSelection();
  dropRows(items);
  offerUndo(
    paths.length === 1 ? t("Restored to {place}", {place: parentOf(paths[0]) || t("Files")})
      : plural(paths.length, "{n} item restored", "{n} items restored"),
    seq
  );
  await refresh();
}

function purgeItems(items) {
  return purge(t("Delete for good?"), t("{what} cannot be brought back after this.", {what: namesOf(items)}),
    t("Delete for good"),
    {nodes: items.map(entry => entry.node)});
}

function emptyTrash() {
  return purge(t("Empty the trash?"), t("What is in it cannot be brought back after this."), t("Empty the trash"));
}

async function purge(title, text, yes, nodes) {
  if (!await askYesNo(title, text, yes)) return;
  await api("POST", "trash/empty", nodes);
  clearSelection();
  await refresh();
}

// ---- starred

async function showStarred() {
  const turn = view.turn, {items} = await api("GET", "starred");
  if (turn === view.turn) showFound("starred", t("Starred"), items, () => [h("p.big", {}, t("Nothing starred yet")),
    h("p", {}, t("A star marks what you want to find again."))]);
}

// a list of things from many places; above: what stands over it, for things in the order of the server
function showFound(kind, title, items, empty, above) {
  const same = view.kind === kind && list.box?.isConnected;
  enterView(kind, title);
  if (!same) setContent(above, ...makeList({columns: ["mtime", "size"], sortable: !above, empty}));
  list.empty = empty;
  fillList(above ? items : sortEntries(items));
}

async function star(items, starred) {
  items = items.filter(entry => Boolean(entry.starred) !== starred);
  await api("POST", "star", {paths: items.map(entry => entry.path), starred});
  const words = {what: namesOf(items)};
  toast(starred ? t("{what} starred", words) : t("Star removed from {what}", words),
    {label: t("Undo"), run: () => attempt(() => star(items.map(entry => ({...entry, starred})), !starred))});
  await refresh();
}

// ---- search: what is looked for stands in the address

const KIND_WORDS = {image: "Images", video: "Videos", audio: "Music", pdf: "PDF", document: "Documents", text: "Texts",
  table: "Tables",
                    archive: "Archives", collection: "Folders"};
const WITHIN = {"": "Names and contents", names: "Names only", contents: "Contents only"};
const SIZES = {"": "Any size", "under-1m": "Under 1 MB", "over-10m": "Over 10 MB", "over-100m": "Over 100 MB",
  "over-1g": "Over 1 GB"};
const CHANGED = {"": "Any time", today: "Today", week: "Last 7 days", month: "Last 30 days", year: "This year",
  older: "Before this year"};
const FILTERS = {within: WITHIN, kind: {"": "Any kind", ...KIND_WORDS}, size: SIZES, changed: CHANGED};
const asked = () => Object.fromEntries(new URLSearchParams(location.search));
const isAsking = ({q, kind, size, changed}) => q || kind || size || changed;
let searchedFrom = "";                 // the collection that was on the screen before

// deep: how many entries of the history belong to this search
function seek(values, replace) {
  const {deep} = history.state || {}, inside = view.kind === "search";
  if (!inside) searchedFrom = inFiles() ? view.path : "";
  return go(PREFIX + "/search" + queryOf(values), {replace, deep: inside ? deep && deep + !replace : 1});
}

const searchSoon = soon(() => {
  const inside = view.kind === "search", values = {...(inside && asked()), q: find(".search input").value.trim()};
  return isAsking(values) ? seek(values, inside) : inside && leaveSearch();
}, 200);

function leaveSearch() {
  const {deep} = history.state || {};
  return deep ? history.go(-deep) : go(addressOf(searchedFrom), {replace: true});
}

function onSearchKey(event) {
  if (event.key !== "Escape") return;
  event.preventDefault();
  event.target.value = "";
  event.target.blur();
  if (view.kind === "search") leaveSearch();
}

async function showSearch() {
  const values = asked(), {q = "", path} = values, turn = view.turn, input = find(".search input");
  if (document.activeElement !== input) input.value = q;
  const {items, more} = isAsking(values) ? await api("GET", "search", searchValues(values)) : {items: []};
  if (turn !== view.turn) return;
  searchedFrom = path || searchedFrom;
  showFound("search", t("Search"), items, () => nothingFound(values), [
    h("div.filters", {onchange: ({target}) => seek({...asked(), [target.name]: target.value})},
      choice("Where", "path", {"": "Everywhere", [searchedFrom]: t("In {name}", {name: nameOf(searchedFrom)})}, "",
        {hidden: !searchedFrom}),
      choice("In", "within", WITHIN), choice("Kind", "kind", FILTERS.kind), choice("Size", "size", SIZES),
      choice("Changed", "changed", CHANGED)),
    h("p.hint", {role: "status"})]);
  for (const box of find(".filters").children) box.value = values[box.name] || "";
  find(".hint").textContent = more ? t("Only the first {n} are shown: narrow it down.", {n: items.length}) : "";
  setTitle(q || t("Search"));
}

function searchValues({size, changed, ...values}) {
  const [, way, n, unit] = /^(under|over)-(\d+)(.)$/.exec(size) || [], bytes = n * 2 ** (unit === "m" ? 20 : 30);
  const today = new Date().setHours(0, 0, 0, 0), year = +new Date(new Date().getFullYear(), 0);
  return {...values, limit: 300, larger: way === "over" && bytes, smaller: way === "under" && bytes - 1,
    after: {today, week: today - 6 * DAY, month: today - 29 * DAY, year}[changed],
    before: changed === "older" && year - 1};
}

function nothingFound({q, path, ...rest}) {
  if (!isAsking({q, ...rest})) return h("p", {}, t("Type what you look for, or choose a filter."));
  const filters = Object.keys(rest).map(name => t(FILTERS[name]?.[rest[name]] || rest[name]));
  const again = values => seek(values).then(() => list.box.focus());          // the button is gone then
  return [h("p.big", {}, q ? t("Nothing found for “{q}”", {q}) : t("Nothing found")),
    h("p", {}, [path && t("In {name}", {name: path}), ...filters].filter(Boolean).join(" · ")),
    path && button(t("Look everywhere"), () => again({q, ...rest})),
    filters.length > 0 && button(t("Clear the filters"), () => again({q, path}))].filter(Boolean);
}

// ---- activity

const ACTIVITY = {
  write: "{who} saved {what}",
  upload: "{who} uploaded {what}",
  "make-collection": "{who} made the folder {what}",
  delete: "{who} deleted {what}",
  move: "{who} moved {what} to {to}",
  copy: "{who} copied {what} to {to}",
  restore: "{who} restored {what}",
  undo: "{who} undid a step",
  rewind: "{who} brought {what} back to an earlier time",
  "restore-version": "{who} restored a version of {what}",
  "empty-trash": "{who} emptied the trash",
  patch: "{who} changed {what}",
  "device-add": "A device was added: {name}",
  "device-remove": "A device was removed: {name}",
  "account-add": "{who} made the account {name}",
  "account-password": "{who} changed the password of {name}",
  sync: "{who} synchronised {what}",
  lock: "{who} locked {what}",
  hold: "A device was held: it deletes or overwrites too much",
  allow: "A held device was allowed to go on",
  "account-admin": "{who} changed the rights of {name}",
  "account-quota": "{who} changed the quota of {name}",
  "account-remove": "{who} removed the account {name}",
  settings: "{who} changed what is kept"
};

async function showActivity() {
  const turn = view.turn, asked = Object.fromEntries(new URLSearchParams(location.search)),
    {action, device, after, until} = asked;
  const time = (day, hour) => day && new Date(day + hour).toISOString();
  const get = before => api("GET", "activity",
    {limit: 100, grouped: 1, action, device, before,
     after: time(after, "T00:00"), until: time(until, "T23:59:59.999")});
  const same = view.kind === "activity" && find(".days");
  const [{steps}, {devices}] = await Promise.all([get(), same ? {} : api("GET", "activity/devices")]);
  if (turn !== view.turn) return;
  enterView("activity", t("Activity"));
  setBar();
  const box = h("div.days");
  const more = button(t("Show more"), () => attempt(async () => addSteps((await get(more.value)).steps)),
    {className: "wide"});
  const addSteps = steps => {
    for (const step of steps) dayOf(box, step.at).append(stepRow(step));
    more.hidden = steps.length < 100;
    if (steps.length) more.value = seqsOf(steps.at(-1)).at(-1);
    box.append(more);
    if (!box.children[1]) box.append(h("p.empty", {}, t("Nothing found")));
  };
  addSteps(steps);
  same ? same.replaceWith(box) : setContent(stepFilters(devices), box);
  for (const one of find(".limits").elements) one.value = asked[one.name] || "";
}

// what is looked for stands in the address
function stepFilters(devices) {
  const change = () =>
    go(PREFIX + "/activity" + queryOf(Object.fromEntries([...new FormData(form)].filter(([, value]) => value))));
  const choose = (name, label, all, rows) => h("select", {name, "aria-label": label},
    h("option", {value: ""}, all), rows.map(([value, words]) => h("option", {value}, words)));
  const day = (name, label) => h("label", {}, label, h("input", {type: "date", name}));
  const form = h("form.limits", {onchange: change},
    choose("action", t("What"), t("Everything"),
      Object.keys(ACTIVITY).filter(name => name !== "upload" && ACTIVITY[name].startsWith("{who}"))
      .map(name => [name, t(ACTIVITY[name], {who: "", what: "…", to: "…"})])),
    choose("device", t("Device"), t("All devices"), devices.map(one => [one.name, agentOf(one)])),
    day("after", t("From")), day("until", t("Until")));
  return form;
}

const deviceName = name => agentOf({kind: "session", name});

function dayOf(box, at) {
  const day = dates.date.format(new Date(at)), last = [...box.querySelectorAll("ol")].pop();
  if (last && last.dataset.day === day) return last;
  const list = h("ol.steps", {"data-day": day});
  box.append(h("h2", {}, day), list);
  return list;
}

const seqsOf = step => step.seqs || [step.seq];

function stepRow(step) {
  const {path = "", name = "", kind} = step.detail, back = step.action === "rewind", gone = step.action === "delete";
  const to = back ? "" : step.detail.to || "", count = back ? 0 : step.detail.count, place = to || path;
  const what = count ? t("“{name}” and {n} more", {name: nameOf(path), n: count - 1}) : path ? quoted(nameOf(path))
    : t("Files");
  const words = t(ACTIVITY[step.detail.new ? "upload" : step.action] || step.action,
    {who: step.account || t("The server"), what: "\0", to: quoted(to), name: agentOf({kind, name})}).split("\0");
  // after the step, or just before it went
  const then = new Date(Date.parse(step.at) - gone).toISOString();
  return h("li", {},
    h("div.what", {},
      words[0], words.length > 1 && (place ? link(what, addressOf(place) + queryOf({at: then})) : what), words[1],
      h("div.soft", {}, dotted(dates.time.format(new Date(step.at)), deviceName(step.device)))
    ),
    h("div.acts", {}, step.undoable ? button(t("Undo"), () => attempt(() => undo([...seqsOf(step)].reverse()))) : null)
  );
}

// ---- a collection as it was

// where a row leads; what lies in the trash is shown as it was just before it went
const addressFor = ({path, deleted}) => deleted ? pastAddress(new Date(Date.parse(deleted) - 1).toISOString(), path)
  : placeAddress(path);
const placeAddress = path => view.at ? pastAddress(view.at, path) : addressOf(path);
const pastAddress = (at, path) => PREFIX + "/past/" + encodeURIComponent(at) + (path && "/" + encodePath(path));

const HOW = {added: "added", deleted: "deleted", changed: "changed", moved: "moved"};

async function showPast(at, address) {
  const path = decodePath(address), turn = view.turn;
  at = decodeURIComponent(at);
  if (Number.isNaN(Date.parse(at))) {                    // "now", or what is no time: the last that happened there
    const {steps: [last]} = await api("GET", "activity", {limit: 1});
    at = last ? last.at : new Date().toISOString();      // our clock may be another
  }
  if (showInside(path, "past", at)) return;
  const there = await load(path, {at}).catch(absent), file = there.kind === "file";
  const place = file ? parentOf(path) : path;
  const [answer, {steps}, since] =
    await Promise.all([file ? load(place, {at}) : there, api("GET", "activity", {limit: 1000}),
    api("GET", "differences/" + encodePath(place), {at, limit: 10000}).catch(error => error.code === "not-found"
      ? {count: 1, changes: [{how: "deleted", path: null, was: place}]} : absent(error))]);
  if (turn !== view.turn) return;
  const same = view.kind === "past" && view.path === place && find(".slider"), marks = marksOf(since.changes, place);
  Object.assign(view, {kind: "past", path: place, at, since});
  setTitle(place ? nameOf(place) : t("Files"));
  setCrumbs(...crumbsOf(place, path => pastAddress(at, path)), h("span.soft", {}, longTime(at)));
  if (!same) setContent(timeSlider(steps), h("details.changes"),
    ...makeList({columns: ["mtime", "size"], empty: () => h("p.big", {}, t("Nothing was here then"))}));
  find(".slider").show();
  showChanges(since);
  fillList(sortEntries(answer.children.map(entry => ({...entry, since: marks.get(entry.name)}))));
  const index = file ? list.entries.findIndex(one => one.name === there.name) : -1;
  if (index < 0) return;
  pick(index);
  openPreview(list.entries[index]);
}

const absent = error => {
  if (error.code !== "not-found" && error.code !== "gone") throw error;
  return {children: [], changes: [], count: 0};
};

// what became of the things in a collection, by name; what lies deeper only changes what holds it
function marksOf(changes, place) {
  const marks = new Map(), below = path => path ? path.slice(place && place.length + 1).split("/")[0] : "";
  for (const {path, was} of changes) for (const name of [below(path), below(was)]) marks.set(name, "changed");
  for (const {how, was} of changes) if (was && parentOf(was) === place) marks.set(nameOf(was), how);
  return marks;
}

function showChanges({count, changes}) {
  const sums = Object.keys(HOW).map(how => [changes.filter(one => one.how === how).length, t(HOW[how])])
    .filter(([n]) => n);
  const how = sums.map(([n, words]) => number.format(n) + " " + words).join(", ");
  find(".changes").replaceChildren(
    h("summary", {}, count ? t("{n} changed since: {how}", {n: count, how}) : t("Nothing has changed since then.")),
    h("ul.steps", {}, changes.slice(0, 500).map(changeRow),
      count > 500 && h("li", {}, t("and {n} more", {n: count - 500}))));
}

const changeRow = ({how, path, was}) => h("li", {}, h("div.what", {},
  link(path || was, path ? addressOf(path) : pastAddress(view.at, was)),
  h("span.tag", {}, t(HOW[how])),
  how === "moved" && h("div.soft", {}, was)));

// one stop for each time something changed here, the latest on the right
function timeSlider(steps) {
  const here = path => path
    && ((path + "/").startsWith(view.path && view.path + "/") || view.path.startsWith(path + "/"));
  const stops = [...new Set(steps
    .filter(({undoable, detail: {path, to, count}}) => undoable && (count || here(path) || here(to)))
    .map(step => step.at))].sort();
  const words = h("output"), move = soon(at => go(pastAddress(at, view.path), {replace: true}), 150);
  const say = at => {
    words.textContent = range.ariaValueText = longTime(at);
    earlier.disabled = range.value < 1;
    later.disabled = range.value > stops.length - 2;
  };
  const moveTo = n => {
    range.value = n;
    say(stops[n]);
    move(stops[n]);
  };
  const range = h("input",
    {type: "range", max: Math.max(0, stops.length - 1), "aria-label": t("Time"), oninput: () => moveTo(range.value)});
  const exact = h("input", {type: "datetime-local", "aria-label": t("Exact time"),
                            onchange: () => exact.value && move(new Date(exact.value).toISOString())});
  const earlier = button(t("Earlier"), () => moveTo(range.value - 1)),
    later = button(t("Later"), () => moveTo(Number(range.value) + 1));
  const show = () => {
    if (![range, earlier, later].includes(document.activeElement))
      range.value = stops.filter(stop => stop <= view.at).length - 1;
    if (!(stops[range.value] > view.at)) say(view.at);   // else the reader is further by now
  };
  const slider = h("div.slider", {}, words, earlier, range, later, exact,
    link(t("Back to now"), addressOf(view.path), {className: "button"}));
  return Object.assign(slider, {show});
}

// what is chosen in the past becomes what it was, and nothing else
async function bringBack(items) {
  const {seq, changed} = await api("POST", "bring-back", {at: view.at, paths: items.map(entry => entry.path)});
  clearSelection();
  if (changed) offerUndo(t("{what} brought back", {what: namesOf(items)}), seq);
  else toast(t("Nothing has changed since then."));
  await refresh();
}

async function rewind() {
  const {path, at} = view,
    {changed} = await api("POST", "rewind", {path, at, dry: true}),
    when = longTime(at);
  if (!changed) return toast(t("Nothing has changed since then."));
  if (
    !(await askYesNo(
      t("Bring this time back?"),
      plural(changed, "{what} becomes what it was on {when}. {n} thing changes; you can undo this.",
        "{what} becomes what it was on {when}. {n} things change; you can undo this.",
        {what: path ? quoted(nameOf(path)) : t("Everything"), when}),
      t("Bring it back")
    ))
  )
    return undefined;
  const {seq} = await api("POST", "rewind", {path, at});
  await go(addressOf(path));
  return offerUndo(t("As it was on {when}", {when}), seq);
}

// ---- settings

const SECTIONS = [
  ["", "Account", accountSection],
  ["connect", "Connect", connectSection],
  ["devices", "Devices", devicesSection],
  ["accounts", "Accounts", accountsSection, true],
  ["server", "Server", serverSection, true]
];

async function showSettings(name) {
  const turn = view.turn,
    [, label, build] = SECTIONS.find(([one, , , admin]) => one === name && (!admin || me.admin)) || SECTIONS[0];
  const parts = await build();
  if (turn !== view.turn) return;
  enterView("settings", t("Settings"));
  setBar(
    SECTIONS.filter(([, , , admin]) => !admin || me.admin).map(([one, words]) =>
      h("a.tab", {href: PREFIX + "/settings" + (one && "/" + one), "aria-current": words === label ? "page" : null},
        t(words)
      )
    )
  );
  setContent(h("div.settings", {}, parts));
}

const gauge = (label, value, max) => h("progress", {max, value, "aria-label": label});
// a form that stands in the page
const formOf = (fields, yes, run) => h("form.way", {onsubmit: event => {
  event.preventDefault();
  attempt(() => run(Object.fromEntries(new FormData(event.target))));
}}, fields, buttonsRow(h("button.primary", {}, yes)));
const section = (title, ...parts) => h("section", {}, h("h2", {}, title), ...parts);

const usedWords = ({used, quota}) => quota === null ? t("{used} used", {used: formatSize(used)})
  : t("{used} of {quota} used", {used: formatSize(used), quota: formatSize(quota)});

async function accountSection() {
  const {kinds, live, versions, trash} = await api("GET", "usage"), all = live + versions + trash || 1;
  const percent = new Intl.NumberFormat(language, {style: "percent"});
  const share = part => part && part < .005 ? "< " + percent.format(.01) : percent.format(part);
  const row = (words, size) =>
    h("div", {}, h("dt", {}, words), h("dd", {}, formatSize(size) + " · " + share(size / all),
    gauge(words, size, all)));
  return [
    section(me.name, h("p", {}, usedWords(me)),
      buttonsRow(button(t("Change password"), changePassword), button(t("Log out"), logOut))),
    section(t("Storage"),
      h("dl.keys.shares", {}, kinds.map(({kind, size}) => row(t(KIND_WORDS[kind] || "Other"), size)),
      row(t("Earlier versions"), versions), row(t("Trash"), trash)),
      buttonsRow(button(t("Empty the trash"), () => attempt(emptyTrash).then(show), {disabled: !trash}))),
    section(t("Language"), languageLinks()),
    section(t("Colours"), themeButtons())
  ];
}

const changePassword = () =>
  askForm(
    t("Change password"),
    [
      ownName(),
      passwordField(t("Present password"), {name: "old", autofocus: true}),
      passwordField(t("New password"), {name: "new", autocomplete: "new-password", minLength: 10}),
      passwordField(t("New password again"), {name: "again", autocomplete: "new-password"})
    ],
    t("Change password"),
    async values => {
      if (values.new !== values.again) throw trouble("", t("The two passwords differ."));
      await api("POST", "account/password", {old: values.old, new: values.new});
      showLogin();
      return true;
    },
    t("Every device has to log in again after this.")
  );

async function devicesSection() {
  const {devices} = await api("GET", "devices");
  const row = device =>
    h("li", {},
      h("div.what", {},
        h("strong", {}, h("bdi", {}, agentOf(device))),
        device.this ? h("span.tag", {}, t("This one")) : null,
        h("div.soft", {},
          [
            t(device.kind === "session" ? "Browser" : "App password"),
            t(device.readonly ? "reads only" : "reads and changes"),
            t(device.limited ? "one folder" : "everything"),
            device.used ? t("used {when}", {when: longTime(device.used)})
              : t("added {when}", {when: longTime(device.created)}),
            device.address
          ].filter(Boolean).join(" · ")
        )
      ),
      h("div.acts", {},
        button(
          t("Revoke"),
          () =>
            attempt(async () => {
              await api("DELETE", "devices/" + device.id);
              device.this ? showLogin() : show();
            }),
          {"aria-label": t("Revoke {name}", {name: agentOf(device)})}
        )
      )
    );
  return section(
    t("Where you are logged in"),
    h("p.soft", {}, t("Revoke what you do not use any more: it is locked out at once.")),
    h("ul.steps", {}, devices.map(row))
  );
}

// "Firefox, Linux" is all a person wants to know of a browser's name
function agentOf({kind, name}) {
  const known = words => words.split(" ").find(word => name.includes(word));
  const browser = known("Edg OPR Firefox Chrome Safari"), system = known("Android iPhone iPad Windows Mac Linux");
  return kind === "session" && browser && system ? ({Edg: "Edge", OPR: "Opera"}[browser] || browser) + ", " + system
    : name;
}

// ---- preview: a file over the list it belongs to, at an address of its own

const preview = {box: null, entry: null, show: 0, edit: null};
const isImage = entry => categoryOf(entry) === "image";
const isPlayed = entry => ["audio", "video"].includes(categoryOf(entry));
const mayBeText = entry => ["text", "table", "other"].includes(categoryOf(entry));      // its bytes will tell

// what fits a file, and how it is shown then: as it is now, as one of its versions or as of a time
const LOOKS = [
  [isImage, pictureView],
  [isPlayed, player],
  [entry => categoryOf(entry) === "pdf" && entry.size < 200 << 20, pdfView],
  [mayBeText, async entry => {
    const source = await readText(entry);
    return source ? textView(entry, source) : noLook(entry);
  }]
];
const lookOf = entry => LOOKS.find(([fits]) => fits(entry));
const lookAt = async entry => (lookOf(entry) || [0, noLook])[1](entry);
const isSeen = entry => lookOf(entry) && categoryOf(entry) !== "other";

function openPreview(entry) {
  closePreview();
  preview.box = h("dialog.preview",
    {onkeydown: onPreviewKey, oncancel: event => { event.preventDefault(); leavePreview(); }});
  preview.box.addEventListener("click", event => {
    if (!preview.show) return;
    event.stopPropagation();
    slideshow(false);
  }, true);
  document.body.append(preview.box);
  preview.box.append(find(".toasts"));
  fillPreview(entry);
  preview.box.showModal();
}

function fillPreview(entry) {
  const held = document.activeElement.dataset.action, inside = preview.box.contains(document.activeElement);
  const act = (name, label, run, when = true) => when && button(label, run, {"data-action": name});
  Object.assign(preview, {entry, edit: null, body: h("div.body"), note: h("div.note", {role: "status"})});
  preview.box.setAttribute("aria-label", entry.name);
  const title = h("div.title", {},
    h("strong", {}, h("bdi", {}, entry.name)),
    view.at && h("span.tag", {}, longTime(view.at)),
    h("span.soft", {}, formatSize(entry.size)),
    button(t("Edit"), () => attempt(() => editFile(entry)), {"data-action": "edit", hidden: true}),
    act("download", t("Download"), () => saveFrom(contentAddress(entry))),
    act("bring-back", t("Bring back"), () => attempt(() => bringBack([entry])), view.at),
    act("versions", t("Versions"), () => go(versionsAddress(entry.path)), !view.at),
    act("link", t("Copy address"), () => attempt(copyLink)),
    button(t("Close"), leavePreview, {className: "primary", autofocus: true}));
  for (const old of preview.box.querySelectorAll(":scope > :not(.toasts)")) old.remove();
  preview.box.prepend(title, preview.note, preview.body, previewFoot(entry));
  if (inside) (find(`[data-action=${held}]:enabled`, preview.box) || find(".primary", preview.box)).focus();
  setTitle(entry.name);
  return attempt(async () => {
    const part = await lookAt(entry).catch(error => failureBox(error, () => fillPreview(entry)));
    if (preview.entry !== entry || preview.edit) return;
    preview.body.replaceChildren(part);
    find("[data-action=edit]", title).hidden = !part.source?.exact || Boolean(view.at);
  });
}

function copyLink() {
  const media = find("video, audio", preview.body), at = media ? Math.floor(media.currentTime) : 0;
  return copyText(location.href.replace(/#.*/, "") + (at ? "#t=" + at : ""));
}

function pictureView(entry) {
  const image = h("img", {
    src: contentAddress(entry), alt: entry.name,
    onload: () => preview.entry === entry && loadAhead(),
    onerror: () => sayUnfit(entry, stage, t("This browser cannot show this kind of picture."))
  });
  const stage = zoomable(image);
  return stage;
}

// in place of what a browser gave up on: was it the browser, or the way to the server?
async function sayUnfit(entry, part, words) {
  const look = () => ask(contentAddress(entry), {headers: {...HEADERS, Range: "bytes=0-0"}});
  const why = entry.size ? await look().then(() => words, explain) : t("This file is empty.");
  part.replaceWith(noLook(entry, why));
}

// the browser's own viewer; the type is ours to say, so that nothing else can come of the bytes.  Its bar would name
// the file after the address of the bytes and save it so: the title above has the name, and the way to save
async function pdfView(entry) {
  const bytes = await (await ask(contentAddress(entry))).arrayBuffer();
  const src = URL.createObjectURL(new Blob([bytes], {type: "application/pdf"}));
  if (!isPhone.matches && navigator.pdfViewerEnabled !== false)
    return h("iframe", {src: src + "#toolbar=0&view=FitH", title: entry.name});
  return noLook(entry, entry.name, h("a.button", {href: src, target: "_blank"}, t("Open in a new tab")));
}

function noLook(entry, why = t("There is no preview of this kind of file."), ...ways) {
  const asText = async () => {
    const part = textView(entry, await readText(entry, true));
    box.replaceWith(part);
    find("pre", part).focus();
  };
  const box = h("div.empty", {}, icon(categoryOf(entry)), h("p", {}, why), h("div.acts", {}, ways,
    button(t("Download"), () => saveFrom(contentAddress(entry))),
    !/image|audio|video|pdf/.test(categoryOf(entry)) && button(t("Show as text"), () => attempt(asText))));
  return box;
}

// it begins where a link says (#t=80); at its end the next of its kind begins
function player(entry) {
  const at = (location.hash.match(/^#t=[\d.]+$/) || [""])[0], kind = categoryOf(entry);
  const media = h(kind, {
    src: contentAddress(entry) + at, controls: true, playsInline: true, autoplay: preview.play,
    onerror: () => sayUnfit(entry, media, t("This browser cannot play this kind of file.")),
    onloadeddata: () => kind === "video" && !media.videoWidth &&
      preview.note.replaceChildren(t("This browser plays only the sound of this film.")),
    onended: () => { if (preview.entry === entry && playsOn()) turnTo(near(1, sameKind), true); }
  });
  return media;
}

const playsOn = () => localStorage.getItem("playon") !== "0";

// a click shows the picture in its full size, another one as a whole again; a finger turns over to the next
function zoomable(image) {
  let from = null;
  const swipe = {
    ontouchstart: ({touches}) => {
      from = touches.length === 1 && !stage.matches(".zoomed") && visualViewport.scale < 1.05 && touches[0];
    },
    ontouchend: ({changedTouches: [to]}) => {
      const x = from ? to.clientX - from.clientX : 0;
      if (preview.entry && Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(to.clientY - from.clientY))
        turnTo(near(x < 0 ? 1 : -1));
    }
  };
  const stage = h("div.stage", {...swipe, onclick: event => {
    if (event.target !== image) return;
    const x = event.offsetX / image.width, y = event.offsetY / image.height;
    stage.classList.toggle("zoomed");
    stage.scrollTo(image.width * x - stage.clientWidth / 2, image.height * y - stage.clientHeight / 2);
  }}, image);
  return stage;
}

// ---- from file to file in the preview

// the files of the list that fit, with the one shown among them, and its place there
function among(fits) {
  const {path} = preview.entry,
    all = list.entries.filter(one => one.kind === "file" && (one.path === path || fits(one)));
  return [all, all.findIndex(one => one.path === path)];
}

const sameKind = one => categoryOf(one) === categoryOf(preview.entry);

function near(step, fits = isSeen, around = false) {
  const [all, n] = among(fits);
  return all[around ? (n + step) % all.length : n + step];
}

function loadAhead() {
  for (const one of [near(1), near(-1)]) if (one && isImage(one)) new Image().src = contentAddress(one);
}

function previewFoot(entry) {
  const [all, n] = among(isSeen), next = near(1, sameKind);
  const turn = (step, label) => button(label, () => turnTo(near(step)), {"data-action": label, disabled: !near(step)});
  const tick = h("input", {type: "checkbox", checked: playsOn(), "data-action": "playon",
                           onchange: () => localStorage.setItem("playon", tick.checked ? "1" : "0")});
  return h("div.foot", {hidden: all.length < 2},
    turn(-1, t("Back")),
    h("span.soft", {}, t("{n} of {all}", {n: n + 1, all: all.length})),
    isImage(entry) && near(1, sameKind, true) !== entry
      && button(t("Slideshow"), () => slideshow(true), {"data-action": "show"}),
    isPlayed(entry) && next && h("label.tick", {}, tick, t("Play on: {name}", {name: next.name})),
    turn(1, t("Next")));
}

async function turnTo(entry, play) {
  if (!entry || !await mayLeave()) return;
  const media = find("video, audio", preview.body);
  preview.play = play || Boolean(media && !media.paused);
  history.replaceState(history.state, "", placeAddress(entry.path));
  setCursor(list.known.get(entry.node));
  fillPreview(entry);
}

// one picture after the other, until any key or click
function slideshow(on) {
  clearInterval(preview.show);
  preview.show = on && setInterval(() => document.hidden || turnTo(near(1, sameKind, true)), 5000);
  preview.box.classList.toggle("showing", on);
  if (on) toast(t("Any key or click ends the slideshow."));
}

const zoom = on => {
  const stage = find(".stage", preview.body);
  if (stage) stage.classList.toggle("zoomed", on);
};

const PREVIEW_KEYS = {
  ArrowRight: () => turnTo(near(1)), ArrowLeft: () => turnTo(near(-1)), "+": () => zoom(true), "-": () => zoom(false),
  s: () => isImage(preview.entry) && slideshow(true),
  e: () => find("[data-action=edit]:not([hidden])", preview.box)?.click()
};

// what can be moved itself by an arrow keeps it
const usesArrows = element => element.matches("video, audio") || element.scrollWidth > element.clientWidth + 1;

function onPreviewKey(event) {
  const run = PREVIEW_KEYS[event.key.length > 1 ? event.key : event.key.toLowerCase()];
  if (preview.show) slideshow(false);
  else if (!run || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "TEXTAREA") return;
  else if (event.key[0] === "A" && (usesArrows(event.target) || find(".zoomed", preview.box))) return;
  else run();
  event.preventDefault();
}

function closePreview() {
  if (!preview.box) return;
  removeDialog(preview.box);
  slideshow(false);
  preview.box = preview.entry = preview.edit = null;
  if (list.box) list.box.focus({preventScroll: true});
  setTitle(view.path ? nameOf(view.path) : t("Files"));
}

async function leavePreview() {
  if (!await mayLeave()) return;
  if (history.state && history.state.inside) history.back();
  else go(placeAddress(view.path), {replace: true});
}

// ---- text, and the bytes it is made of: what nobody edited is given back as it came

const TEXT_MOST = 2 << 20;             // bytes of text that are shown or edited
const HEAD = 64 << 10;                 // bytes that tell whether a file of no known kind is text
const MARKS = {"UTF-8": [0xef, 0xbb, 0xbf], "UTF-16LE": [0xff, 0xfe], "UTF-16BE": [0xfe, 0xff]};

// {text, codec, whole, exact, etag}: what a file says; exact: writing the text gives its bytes, so it can be edited.
// null if it is no text, unless that is to be shown anyhow
async function readText(entry, anyhow) {
  const get = async most => {
    const part = entry.size > most ? {Range: `bytes=0-${most - 1}`} : {};
    const answer = await ask(contentAddress(entry), {headers: {...HEADERS, ...part}, cache: "no-cache"});
    return [new Uint8Array(await answer.arrayBuffer()), answer];
  };
  if (categoryOf(entry) === "other" && entry.size > HEAD && !anyhow && !codecOf((await get(HEAD))[0])) return null;
  const [bytes, answer] = await get(TEXT_MOST), whole = answer.status !== 206;
  const codec = codecOf(bytes) || anyhow && {name: "Windows-1252", mark: [], guess: true};
  if (!codec) return null;
  const body = bytes.subarray(codec.mark.length);
  const text = new TextDecoder(codec.name, {ignoreBOM: true}).decode(body, {stream: !whole});
  return {text, codec, whole, etag: answer.headers.get("ETag"),
    exact: whole && sameBytes(bytes, writeText(text, codec))};
}

// {name, mark, guess}: how bytes are to be read; null if they are no text
function codecOf(bytes) {
  const nuls = [0, 0], isWide = n => nuls[n] > bytes.length / 8 && !nuls[1 - n];
  bytes.forEach((byte, n) => { nuls[n % 2] += !byte; });
  const marked = Object.keys(MARKS).find(name => MARKS[name].every((byte, n) => bytes[n] === byte));
  const name = marked || (isWide(0) ? "UTF-16BE" : isWide(1) ? "UTF-16LE" : "UTF-8");
  const codec = {name, mark: MARKS[marked] || []};
  try {
    new TextDecoder(name, {fatal: name === "UTF-8"}).decode(bytes, {stream: true});
  } catch {
    Object.assign(codec, {name: "Windows-1252", mark: [], guess: true});
  }
  return /[\0-\x06\x0e-\x19]/.test(new TextDecoder(codec.name).decode(bytes, {stream: true})) ? null : codec;
}

const wide = little => text => {
  const units = new DataView(new ArrayBuffer(2 * text.length));
  for (let n = 0; n < text.length; n++) units.setUint16(2 * n, text.charCodeAt(n), little);
  return new Uint8Array(units.buffer);
};
const WRITERS = {"UTF-8": text => new TextEncoder().encode(text), "UTF-16LE": wide(true), "UTF-16BE": wide(false),
  "Windows-1252": narrow};

function narrow(text) {
  const signs = new TextDecoder("windows-1252").decode(Uint8Array.from({length: 256}, (_, n) => n));
  return Uint8Array.from(text, sign => {
    const byte = signs.indexOf(sign);
    if (byte < 0) throw trouble("", t("“{sign}” does not exist in the encoding of this file ({name}).",
      {sign, name: "Windows-1252"}));
    return byte;
  });
}

// throws what cannot be written so
function writeText(text, {name, mark}) {
  const body = WRITERS[name](text), bytes = new Uint8Array(mark.length + body.length);
  bytes.set(mark);
  bytes.set(body, mark.length);
  return bytes;
}

const sameBytes = (a, b) => a.length === b.length && a.every((byte, n) => byte === b[n]);

// what was typed, with the line ends of the text before: each line that stayed keeps its own
function withEnds(before, typed) {
  const ends = before.match(/\r\n|\r|\n/g) || [], count = end => ends.filter(one => one === end).length;
  const [most = "\n", other] = [...new Set(ends)].sort((a, b) => count(b) - count(a));
  const lines = typed.split("\n"), runs = other && diffLines(before.split(/\r\n|\r|\n/), lines) || [["+", lines]];
  const wanted = [];
  let at = 0;
  for (const [sign, some] of runs) {
    if (sign !== "-") wanted.push(...some.map((_, n) => sign === " " && ends[at + n] || most));
    if (sign !== "+") at += some.length;
  }
  // an empty line between these two would be none any more
  const joins = n => wanted[n] === "\r" && lines[n + 1] === "" && wanted[n + 1] === "\n";
  return lines.map((line, n) => n === lines.length - 1 ? line : line + (joins(n) ? "\r\n" : wanted[n])).join("");
}

function textView(entry, source) {
  const [body, cut] = pageOf(entry, source.text), whole = source.whole && entry.size;
  return Object.assign(h("div.pages", {},
    !entry.size && h("p.note", {}, t("This file is empty.")),
    !source.whole && h("p.note", {}, t("Only the first {n} are shown.", {n: formatSize(TEXT_MOST)})),
    cut && h("p.note", {}, cut),
    source.codec.guess && h("p.note", {}, t("This is not UTF-8; that it is {name} is a guess.", source.codec)),
    body), {source});
}

// [what shows it, words about what it leaves out]
function pageOf(entry, text) {
  if (/\.(md|markdown)$/i.test(entry.name)) return [h("div.paper", {}, markdown(text, parentOf(entry.path)))];
  if (!/\.[ct]sv$/i.test(entry.name)) return [h("pre", {tabIndex: 0}, raw(text))];
  const rows = parseTable(text, /\.tsv$/i.test(entry.name) ? "\t" : "");
  const cut = rows.length > ROWS_MOST && t("Only the first {n} rows are shown.", {n: ROWS_MOST});
  return [tableView(rows.slice(0, ROWS_MOST)), cut];
}

// ---- editing text

async function newText() {
  await ensureFiles();
  await askForm(t("New text file"), [nameInput(t("Name"), t("Note") + ".txt")], t("Create"), async ({name}) => {
    checkName(name);
    const path = join(view.path, name),
      made = await api("PUT", "files/" + encodePath(path), {}, {"If-None-Match": "*"}).catch(sayTaken);
    await refresh();
    await go(addressOf(path));
    editFile(made);
    return true;
  });
}

// what was typed and not saved yet also lies in this browser, whatever becomes of the page: {text, etag}
const draftName = path => ["draft", me.name, path].join("|");
const isEdited = () => Boolean(preview.edit) && preview.edit.area.value !== preview.edit.saved;

function keepDraft() {
  const {edit} = preview;
  if (!edit) return;
  const text = edit.area.value;
  try {
    if (text === edit.saved) localStorage.removeItem(edit.draft);
    else localStorage.setItem(edit.draft, JSON.stringify({text, etag: edit.etag}));
  } catch { /* it has no room; then leaving asks, and no more */ }
}

const keepDraftSoon = soon(keepDraft, 300);

async function editFile(entry) {
  if (preview.entry?.path !== entry.path) await go(addressOf(entry.path));
  const source = await readText(entry);
  if (preview.entry?.path !== entry.path) return;
  if (!source?.exact) throw trouble("", t("This file cannot be edited here."));
  const area = h("textarea", {value: source.text, "aria-label": entry.name, spellcheck: false, oninput: () => {
    keepDraftSoon();
    edit.save.disabled = !isEdited();
  }});
  const save = button(t("Save"), () => attempt(() => saveText(edit)), {className: "primary", disabled: true});
  const edit = preview.edit = {path: entry.path, etag: source.etag, source, area, save, saved: area.value,
    draft: draftName(entry.path)};
  area.addEventListener("keydown", event => {
    if ((event.ctrlKey || event.metaKey) && event.key === "s") {
      event.preventDefault();
      save.click();
    }
  });
  preview.body.replaceChildren(area);
  find(".title [data-action=edit]", preview.box).replaceWith(save);
  area.focus();
  area.setSelectionRange(0, 0);
  takeDraft(edit);
}

// what an earlier visit left unsaved is there again
function takeDraft(edit) {
  const draft = JSON.parse(localStorage.getItem(edit.draft) || "null"), {etag} = edit;
  if (!draft || draft.text === edit.saved) return;
  const put = (text, etag) => {
    edit.area.value = text;
    edit.etag = etag;
    edit.save.disabled = !isEdited();
    edit.area.focus();
    edit.area.setSelectionRange(0, 0);
    keepDraft();
  };
  put(draft.text, draft.etag);
  toast(t("This is what you typed before and did not save."),
    {label: t("Discard it"), run: () => put(edit.saved, etag)});
}

async function saveText(edit) {
  const typed = edit.area.value, text = withEnds(edit.source.text, typed), body = writeText(text, edit.source.codec);
  edit.save.disabled = true;
  const put = given => ask(apiAddress("files", edit.path), {method: "PUT", body, headers: {...HEADERS, ...given}});
  const answer = await put({"If-Match": edit.etag}).catch(async error => {
    edit.save.disabled = false;
    if (error.code !== "precondition-failed" && error.code !== "not-found") throw error;
    if (!await askToReplace(edit.path)) throw new DOMException("", "AbortError");
    return put({});
  });
  Object.assign(preview.entry, await answer.json());
  Object.assign(edit, {etag: answer.headers.get("ETag"), saved: typed});
  edit.source.text = text;
  edit.save.disabled = !isEdited();
  keepDraft();
  preview.note.replaceChildren();
  toast(t("Saved."));
  refreshSoon();
}

async function askToReplace(path) {
  const {etag} = await load(path, {limit: 1}).catch(absent);
  return etag ? askYesNo(t("Somebody else saved this file"),
    t("It changed since you opened it. If you save now, their version stays among the versions."), t("Save mine"))
    : askYesNo(t("Somebody deleted this file"), t("If you save now, it is there again."), t("Save mine"));
}

// may the view go, with what was typed in it?  Saved, given up or not there: true
let leaving = null;
function mayLeave() {
  const asked = () => isEdited() ? leaveEdit() : isTyped(find("#app")) ? askToLeave() : true;
  leaving = leaving || Promise.resolve(asked()).then(Boolean).finally(() => { leaving = null; });
  return leaving;
}

async function leaveEdit() {
  const {edit} = preview;
  const answer = await sheet(t("Leave without saving?"), close => [h("p", {}, t("You changed this text.")), buttonsRow(
    button(t("Go on editing"), () => close()),
    button(t("Do not save"), () => close("lose"), {className: "danger"}),
    button(t("Save"), () => close("save"), {className: "primary", autofocus: true}))]);
  if (answer === "save") await attempt(() => saveText(edit));
  if (answer === "lose") {
    preview.edit = null;
    localStorage.removeItem(edit.draft);
  }
  return !isEdited();
}

// ---- tables

const ROWS_MOST = 2000;

// rows of cells, one more than are shown
function parseTable(text, comma) {
  const first = text.slice(0, text.indexOf("\n") >>> 0);
  comma = comma || [",", ";", "\t"].reduce((best, mark) =>
    (first.split(mark).length > first.split(best).length ? mark : best));
  const rows = [[]],
    cell = new RegExp(`(?:"((?:[^"]|"")*)"|([^"\\r\\n${comma}]*))(${comma}|\\r?\\n|$)`, "y");
  for (let found; rows.length < ROWS_MOST + 2 && cell.lastIndex < text.length && (found = cell.exec(text));) {
    rows[rows.length - 1].push(found[1] === undefined ? found[2] : found[1].replace(/""/g, '"'));
    if (found[3] !== comma) rows.push([]);
  }
  return rows.filter(row => row.length);
}

const tableOf = ([head, ...rows]) =>
  h("table", {},
    h("thead", {},
      h("tr", {},
        (head || []).map(cell => h("th", {scope: "col"}, cell))
      )
    ),
    h("tbody", {},
      rows.map(row =>
        h("tr", {},
          row.map(cell => h("td", {}, cell))
        )
      )
    )
  );
const tableView = rows => h("div.sheetful", {tabIndex: 0}, tableOf(rows.map(row => row.map(raw))));

// ---- Markdown, to elements of a fixed list and never by way of markup

async function showReadme() {
  const box = find(".readme"),
    entry = list.entries.find(one => /^readme\.(md|markdown|txt)$/i.test(one.name) && one.size < TEXT_MOST),
    turn = view.turn;
  if (!box || box.dataset.etag === (entry ? entry.etag : "")) return;
  const source = entry && await readText(entry);
  if (turn !== view.turn) return;
  box.dataset.etag = entry ? entry.etag : "";
  box.replaceChildren(...source ? [textView(entry, source)] : []);
}

function markdown(text, place) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  return blocks(lines, place, 0);
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, FENCE = /^\s*(```|~~~)/;

function blocks(lines, place, depth) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    const [element, next] = block(lines, at, place, depth);
    if (element) found.push(element);
    at = next;
  }
  return found;
}

// the block that begins at a line, and the line after it
function block(lines, at, place, depth) {
  const line = lines[at],
    until = test => {
      let end = at;
      while (end < lines.length && test(lines[end], end)) end++;
      return end;
    };
  const heading = line.match(/^(#{1,6})\s+(.*?)\s*#*$/);
  if (!line.trim()) return [null, at + 1];
  if (heading) return [h("h" + heading[1].length, {}, inline(heading[2], place)), at + 1];
  if (FENCE.test(line)) {
    const end = until((one, n) => n === at || !FENCE.test(one));
    return [h("pre", {tabIndex: 0}, h("code", {}, raw(lines.slice(at + 1, end).join("\n")))), end + 1];
  }
  if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) return [h("hr"), at + 1];
  if (/^\s*>/.test(line) && depth < 20) {
    const end = until(one => /^\s*>/.test(one));
    return [h("blockquote", {}, blocks(lines.slice(at, end).map(one => one.replace(/^\s*> ?/, "")), place, depth + 1)),
      end];
  }
  if (ITEM.test(line) && depth < 20) return listBlock(lines, at, place, depth);
  if (line.includes("|") && /^[\s|:-]*-[\s|:-]*$/.test(lines[at + 1] || "") && lines[at + 1].includes("|")) {
    const end = until(one => one.includes("|")),
      cells = one =>
        one.trim().replace(/^\||\|$/g, "")
          .split("|")
          .map(cell => inline(cell.trim(), place));
    return [tableOf([cells(line), ...lines.slice(at + 2, end).map(cells)]), end];
  }
  const end = Math.max(
    at + 1,
    until((one, n) => one.trim() && (n === at || !(/^#{1,6}\s|^\s*>/.test(one) || FENCE.test(one) || ITEM.test(one))))
  );
  return [h("p", {}, inline(lines.slice(at, end).join("\n"), place)), end];
}

function listBlock(lines, at, place, depth) {
  const [, indent, mark] = lines[at].match(ITEM),
    ordered = /\d/.test(mark),
    items = [];
  for (;;) {
    const start = at < lines.length && lines[at].match(ITEM);
    if (!start || start[1].length !== indent.length || /\d/.test(start[2]) !== ordered) break;
    const inside = [start[3]];
    for (
      at++;
      at < lines.length && (lines[at].trim() ? lines[at].search(/\S/) > indent.length
        : ITEM.test(lines[at + 1] || "") || /^\s{2}/.test(lines[at + 1] || ""));
      at++
    )
      inside.push(lines[at].slice(Math.min(indent.length + 2, lines[at].search(/\S|$/))));
    const tick = inside[0].match(/^\[([ xX])\]\s+/);
    if (tick) inside[0] = inside[0].slice(tick[0].length);
    const plain = inside.length === 1 ? inline(inside[0], place) : blocks(inside, place, depth + 1);
    items.push(
      h("li", {},
        tick && h("input", {type: "checkbox", disabled: true, checked: tick[1] !== " ", "aria-label": t("Done")}),
        plain
      )
    );
  }
  return [h(ordered ? "ol" : "ul", {}, items), at];
}

const INLINE = new RegExp([
  /(`+)(.+?)\1/,                                   // backquotes: code
  /!\[([^\]]*)\]\(([^()\s]+)(?:\s+"[^"]*")?\)/,    // ![picture](address title)
  /\[([^\]]+)\]\(([^()\s]+)(?:\s+"[^"]*")?\)/,     // [label](address title)
  /\*\*(.+?)\*\*/, /__(.+?)__/,                    // **strong**
  /\*([^*\s][^*]*?)\*/, /\b_([^_]+?)_\b/,          // *soft*
  /~~(.+?)~~/,                                     // ~~gone~~
  /<(https?:\/\/[^\s<>]+)>/, /(https?:\/\/[^\s<>()]+[^\s<>().,:;!?'"])/,
  /\\([^\w\s])/,                                   // \* stays as it is
  /( {2,}\n)/                                      // two blanks break the line
].map(part => part.source).join("|"), "s");

function inline(text, place) {
  const parts = [];
  for (let found; (found = text.match(INLINE));) {
    if (found.index) parts.push(text.slice(0, found.index));
    parts.push(span(found, place));
    text = text.slice(found.index + found[0].length);
  }
  return [...parts, text].map(part => typeof part === "string" ? raw(part) : part);
}

function span([, , code, alt, source, label, target, strong, strong2, soft, soft2, gone, angle, bare, escaped], place) {
  if (code !== undefined) return h("code", {}, raw(code));
  if (source !== undefined)
    return /^[a-z][a-z0-9+.-]*:|^\//i.test(source)
      ? alt : h("img", {src: apiAddress("content", resolve(place, source)), alt, loading: "lazy"});
  if (label !== undefined) return linkTo(target, inline(label, place), place);
  if (angle || bare) return linkTo(angle || bare, [angle || bare], place);
  if (strong || strong2) return h("strong", {}, inline(strong || strong2, place));
  if (soft || soft2) return h("em", {}, inline(soft || soft2, place));
  if (gone) return h("del", {}, inline(gone, place));
  return escaped || h("br");
}

function linkTo(target, label, place) {
  if (/^(https?|mailto):/i.test(target))
    return h("a", {href: target, target: "_blank", rel: "noopener noreferrer"}, label);
  return /^[a-z][a-z0-9+.-]*:|^[/#?]/i.test(target)
    ? h("span", {}, label)
    : h("a", {href: addressOf(resolve(place, target))}, label);
}

// a relative address in a file of `place`, as a path
function resolve(place, target) {
  const path = place ? place.split("/") : [];
  let plain = target.replace(/[?#].*$/s, "");
  try { plain = decodeURIComponent(plain); } catch { /* it stays as it was written */ }
  for (const part of plain.split("/")) part === ".." ? path.pop() : part && part !== "." && path.push(part);
  return path.join("/");
}

// ---- settings: connecting other programs

const WAYS = (address, name, token, secret = token || t("APP-PASSWORD")) => [
  [t("Phone or tablet: photos and files"),
   isHere() ? t("A phone cannot reach {host}: open this page by the address that this computer has in your network.",
     location)
     : token ? t("Install the Nextcloud app, choose “Log in”, and scan this code or type the address.")
     : t("Install the Nextcloud app. Make an app password above, and here is a code for it to scan."),
   location.origin + PREFIX,
   token && !isHere() && `nc://login/server:${location.origin + PREFIX}&user:${name}&password:${token}`],
  [t("Phone or tablet: WebDAV"),
   t("An app for WebDAV, as Documents (iOS) or Material Files (Android): this address, your name, the app password."),
   address],
  [t("Synchronised folder"), t("Keeps a folder of your computer and this server the same, both ways."),
   `python3 cloudserver.py sync FOLDER ${location.protocol}//${plainPath(name)}@${location.host}${PREFIX}`],
  ["Windows", t("In the Explorer: This PC, “Map network drive”; or as below. Windows wants HTTPS for it."),
   `net use Z: "${address}" "${secret}" /user:"${name}"`],
  ["Mac", t("In the Finder: Go, “Connect to Server”, with this address:"), address],
  ["Linux", t("In the file manager, as the address of a server:"),
   address.replace(/^http/, "dav").replace("://", "://" + plainPath(name) + "@")],
  ["rclone", "",
   `rclone config create cloud webdav url=${address} vendor=other user=${shellWord(name)} pass=${secret} --obscure`],
  ["curl", "", `curl -u ${shellWord(name + ":" + secret)} -T FILE ${address}`],
];

// does the address of this page mean the computer it is opened on?
function isHere() {
  return /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
}

function connectSection() {
  const box = h("div.ways"), made = h("div", {"aria-live": "polite"});
  const show = token => box.replaceChildren(...WAYS(davAddress(""), me.name, token)
    .map(([title, hint, command, code]) => h("div", {}, h("h3", {}, title), hint && h("p.soft", {}, hint),
      commandLine(command), code && qrOf(code))));
  let path = "";
  const where = button(t("All folders"), async () => {
    path = await chooseCollection(t("Only this folder"), t("Choose"), path) ?? path;
    where.textContent = path ? plain(t("Only {name}", {name: path})) : t("All folders");
  });
  const form = formOf([
    field(t("Name of the device"), {name: "name", maxLength: 100, placeholder: "laptop", autocomplete: "off"}),
    tick(t("May only read"), {name: "readonly"}),
    h("div.buttons", {}, where,
      choice("Ends", "days",
        {7: "Ends after 7 days", 30: "Ends after 30 days", 365: "Ends after a year", "": "Never ends"}, ""))
  ], t("Make an app password"), async ({name, readonly, days}) => {
    const {token} = await api("POST", "devices",
      {name, readonly: Boolean(readonly), path: path || undefined, days: +days || undefined});
    made.replaceChildren(h("p", {}, t("This password is shown only now; it stands in the commands below.")),
      commandLine(token));
    show(token);
  });
  show("");
  return [
    section(t("A password for each device"),
      h("p.soft", {}, t("Other programs get a password of their own, which you can revoke under “Devices”.")),
      form, made),
    section(t("Ways to connect"), box)
  ];
}

// a code for a phone to scan; the server works it out
function qrOf(text) {
  const drawing = svg("svg",
    {class: "qr", role: "img", "aria-label": t("Code to scan"), "shape-rendering": "crispEdges"});
  attempt(async () => {
    const {rows} = await api("POST", "qr", {text}), size = rows.length + 8;
    const dark = rows.flatMap((row, y) => [...row].map((on, x) => on === "1" ? `M${x + 4} ${y + 4}h1v1h-1z` : ""))
      .join("");
    drawing.setAttribute("viewBox", `0 0 ${size} ${size}`);
    drawing.append(svg("path", {d: dark, fill: "#000"}));
  });
  return drawing;
}

const commandLine = text =>
  h("div.command", {}, h("code", {tabIndex: 0}, text), button(t("Copy"), () => copyText(text)));

// browsers lend the clipboard only where the connection is secure
const copyText = text => attempt(async () => {
  if (await navigator.clipboard?.writeText(text).then(() => true, () => false)) return toast(t("Copied."));
  return sheet(t("Copy this"), close => [
    h("textarea", {value: text, readOnly: true, autofocus: true, "aria-label": t("Copy this"),
      onfocus: event => event.target.select()}),
    buttonsRow(button(t("Close"), () => close()))]);
});

// one word of a command line, whatever is in it; addresses need no marks, as all that a shell could mean is encoded
const shellWord = text => /^[\w.,:@%+-]+$/.test(text) ? text : "'" + text.replace(/'/g, "'\\''") + "'";
const plainPath = path => encodePath(path).replace(/[!'()*]/g, mark => "%" + mark.charCodeAt(0).toString(16));
const davAddress = (path, end = "") => location.origin + PREFIX + "/dav/" + plainPath(path) + (path && end);

function curlFor({path, name, kind}) {
  const address = kind === "file" ? davAddress(path) : location.origin + PREFIX + "/api/v1/zip/" + plainPath(path);
  return `curl -u ${shellWord(me.name)} -o ${shellWord(kind === "file" ? name : name + ".zip")} ${address}`;
}

// ---- settings: accounts, for administrators

const GB = 2 ** 30;
const gigabytes = (label, name, bytes) => field(label, {name, type: "number", min: 0, step: "any", required: false,
                                                        value: bytes === null ? "" : bytes / GB});
const quotaField = quota => gigabytes(t("Quota in GB; empty is no limit"), "quota", quota);
const readGigabytes = text => text === "" ? -1 : Math.round(text * GB);

async function accountsSection() {
  const {accounts} = await api("GET", "accounts");
  return section(t("Accounts"), h("ul.steps", {}, accounts.map(accountRow)),
    buttonsRow(button(t("New account"), newAccount, {className: "primary"})));
}

async function serverSection() {
  const [{version, health, python, sqlite, disk_free, disk_total}, {keep_days, history, quota}, {steps}] =
    await Promise.all(["status", "settings", "activity/server"].map(what => api("GET", what)));
  const facts = [[t("Version"), version], [t("State"), health], ["Python", python], ["SQLite", sqlite],
    [t("Free on disk"), t("{free} of {total}", {free: formatSize(disk_free), total: formatSize(disk_total)})]];
  return [
    section(t("Server"),
      h("dl.keys", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      gauge(t("Disk used"), disk_total - disk_free, disk_total)),
    section(t("What is kept"), formOf([
      field(t("Days that versions and deleted files are kept"),
        {name: "days", type: "number", min: 0, max: 36500, value: keep_days}),
      gigabytes(t("The most they may take per account, in GB; empty is no limit"), "history", history),
      h("p.soft", {}, t("What is older goes for good; of what is more than the most, the oldest goes first.")),
      gigabytes(t("Quota of new accounts in GB; empty is no limit"), "quota", quota)], t("Save"),
        async ({days, history, quota}) => {
      await api("PATCH", "settings", {keep_days: +days, history: readGigabytes(history), quota: readGigabytes(quota)});
      toast(t("Saved."));
      show();
    })),
    section(t("Recently"), h("ol.steps", {}, steps.slice(0, 50).map(step => stepRow({...step, undoable: false}))))
  ];
}

function accountRow(account) {
  const {name, quota, files, admin} = account, address = "accounts/" + encodeURIComponent(name);
  const change = async values => { await api("PATCH", address, values); show(); };
  const rows = [
    {label: t("Set the quota"),
     run: () => askForm(name, [quotaField(quota)], t("Save"), values => change({quota: readGigabytes(values.quota)}))},
    ...name === me.name ? [] : [{label: t("Set a new password"),
     run: () => askForm(name, [ownName(name), passwordField(t("New password"),
       {autocomplete: "new-password", autofocus: true})], t("Save"), ({password}) => change({password}))}],
    {label: admin ? t("Administrator no more") : t("Make administrator"),
     run: () => attempt(() => change({admin: !admin}))},
    {label: t("Remove"), run: () => attempt(async () => {
      if (await askYesNo(t("Remove the account {name}?", {name}),
        t("Nobody can log in with it any more. Its files go after a while."), t("Remove")))
        await api("DELETE", address);
      show();
    })}
  ];
  return h("li", {},
    h("div.what", {}, h("strong", {}, h("bdi", {}, name)), admin && h("span.tag", {}, t("Administrator")),
      h("div.soft", {}, usedWords(account) + " · " + plural(files, "{n} file", "{n} files"))),
    h("div.acts", {}, button(t("Change"), event => menu(event.currentTarget, rows),
      {"aria-haspopup": "menu", "aria-label": t("Change {name}", {name})})));
}

const newAccount = () => askForm(t("New account"), [nameField({autocomplete: "off", autofocus: true}),
  passwordField(t("Password"), {autocomplete: "new-password"}), quotaField(null)], t("Create"),
  async ({name, password, quota}) => {
    await api("POST", "accounts", {name: name.trim(), password, quota: quota === "" ? null : readGigabytes(quota)});
    show();
  });

// ---- a device that asks to be let in

async function showGrant(token) {
  const asked = await api("GET", "grants/" + token).catch(error => {
    if (!isGone(error)) throw error;
    return null;
  });
  if (!asked)
    return showGate(t("This link has expired"), t("Start again in the program that sent you here."), [], "", null);
  const {device, address, minutes, code, near} = asked;
  const facts = [[t("It calls itself"), device], [t("It asks from"), address],
    [t("Asked"), minutes ? plural(minutes, "{n} minute ago", "{n} minutes ago") : t("Just now")], [t("Code"), code]];
  return showGate(
    t("Grant access?"),
    t("A device wants to see and change the files of {name}. Grant it only if you started this yourself, just now.",
      me),
    [h("dl.keys", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("bdi", {}, value))))),
     h("p.soft", {}, t("If the device shows a code, it has to be the same.")),
     near ? "" : h("p.problem", {}, t("It asks from another network than the one you are in."))],
    t("Grant access"),
    async () => {
      await api("POST", "grants/" + token);
      showGate(t("Done"), t("You can close this window now."), [], "", null);
    }
  );
}

// ---- what others do: changes as they happen, and the brake

let source = null, seen = 0;

function watchServer() {
  if (source) source.close();
  if (!me.name) return;
  source = document.hidden ? null : new EventSource(PREFIX + "/api/v1/events");
  if (source)
    source.onmessage = event => {
      const {seq} = JSON.parse(event.data);
      if (seen !== seq) changed(seen);
      seen = seq;
    };
  showHeld();
}

const changed = soon(async before => {
  showHeld();
  if (!before || list.editing) return;
  await followPreview();
  if (["trash", "starred", "failed"].includes(view.kind) || view.kind === "activity" && scrollY < 300) await show();
  if (!inFiles()) return;
  const turn = view.turn, {etag} = await load(view.path, {limit: 1}).catch(absent);
  if (turn === view.turn && etag !== view.etag) await refresh();
}, 400, true);

// what is open is shown as it is now; what is being edited, played or gone is told of
async function followPreview() {
  const {entry, edit, note} = preview;
  if (!entry || !inFiles()) return;
  const now = await load(entry.path).catch(absent);
  if (preview.entry !== entry || preview.edit !== edit) return;
  if (now.etag === (edit ? edit.etag.slice(1, -1) : entry.etag)) return;
  if (!now.etag) return note.replaceChildren(t("Somebody moved or deleted this file."));
  if (edit || isPlayed(entry)) return note.replaceChildren(t("Somebody else saved this file."), isEdited() ? "" :
    button(t("Show what is there now"), () => fillPreview(now)));
  const scroll = find(".pages", preview.body)?.scrollTop;
  await fillPreview(now);
  preview.note.replaceChildren(t("Somebody changed this file; you see it as it is now."));
  find(".pages", preview.body)?.scrollTo(0, scroll);
}

const showHeld = soon(async () => {
  const {held} = await api("GET", "held"),
    box = find(".banners");
  if (!box) return;
  const decide = (what, device) =>
    attempt(async () => {
      const done = await api("POST", what, {device});
      await showHeld();
      if (done) offerUndo(t("Taken back."), done.seq);
      await refresh();
    });
  box.replaceChildren(...held.map(one => h("div.banner", {role: "alert"},
    h("span", {}, heldWords(one)),
    button(t("Allow"), () => decide("allow", one.device)),
    button(t("Undo"), () => decide("undo-device", one.device), {className: "primary"}))));
}, 50);

function heldWords(one) {
  if (!one.overwrites) return t("“{name}” is held: it wants to delete {deletes} files.", one);
  if (!one.deletes) return t("“{name}” is held: it wants to overwrite {overwrites} files.", one);
  return t("“{name}” is held: it wants to delete {deletes} and overwrite {overwrites} files.", one);
}

// ---- keys

function showHelp() {
  const rows = [
    ...ACTIONS.filter(action => action.keys).map(action => [t(action.label), showKeys(action.keys)]),
    [t("Choose"), "↑ ↓"],
    [t("Choose several"), showKeys("Shift") + " ↑ ↓"],
    [t("Choose one more"), t("Space")]
  ];
  return sheet(t("Keyboard shortcuts"), close => [
    h("dl.keys", {tabIndex: 0},
      rows.map(([label, key]) => h("div", {}, h("dt", {}, label), h("dd", {}, h("kbd", {}, key))))
    ),
    buttonsRow(button(t("Close"), () => close(), {className: "primary", autofocus: true}))
  ]);
}

function keyOf(event) {
  const plain = event.key.length === 1 && !event.ctrlKey && !event.metaKey ? event.key.toUpperCase() : event.key;
  const name = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const letter = /^[A-Z]$/.test(name);
  return (
    (event.ctrlKey || event.metaKey ? "Ctrl+" : "") +
    (event.shiftKey && (letter || event.key.length > 1) ? "Shift+" : "") +
    (letter ? name : plain)
  );
}

function actionOf(event) {
  const key = keyOf(event) === "Backspace" && onMac ? "Delete" : keyOf(event), items = selection();
  return ACTIONS.find(one => one.keys === key && one.when(items));
}

function onKey(event) {
  if (!me.name || event.defaultPrevented
    || event.target.closest("input:not([type=checkbox]), textarea, select, dialog"))
    return;
  const action = actionOf(event);
  if (!action || action.name === "paste") return; // the paste event knows whether files come with it
  if (event.key === "Enter" && event.target.closest("a, button")) return;
  event.preventDefault();
  act(action);
}

// ---- the start

function listen() {
  addEventListener("popstate", onPop);
  darkSystem.addEventListener("change", applyTheme);
  addEventListener("scroll", drawRows, {passive: true});
  addEventListener("resize", () => {
    if (!list.box?.isConnected) return;
    redrawRows();
    showBar();
  });
  addEventListener("keydown", onKey);
  addEventListener("dragstart", onDragStart);
  addEventListener("dragover", onDragOver);
  addEventListener("dragleave", event => { if (!event.relatedTarget) unmarkDrop(); });
  addEventListener("drop", onDrop);
  addEventListener("paste", onPaste);
  addEventListener("online", () => {
    queue.delayed.forEach(wake);
    if (patience) startLater(0);
    if (view.kind === "failed") show();
  });
  // a page kept to come back to must not keep its connection
  addEventListener("pagehide", () => source && source.close());
  addEventListener("pageshow", event => event.persisted && watchServer());
  document.addEventListener("visibilitychange", watchServer);
  addEventListener("beforeunload", event => { if (busy() || isTyped()) event.preventDefault(); });
  addEventListener("pagehide", keepDraft);
  addEventListener("pagehide", noteBroken);
  document.addEventListener("visibilitychange", keepDraft);
  document.addEventListener("click", onLinkClick);
  document.addEventListener("contextmenu", event => {
    if (
      !event.target.closest("main") ||
      event.target.closest("a, button, input, textarea, pre, dialog") ||
      !list.box?.isConnected
    )
      return;
    event.preventDefault();
    const row = event.target === list.box && list.rows.get(list.at);       // by a key: where the cursor is
    if (!row) clearSelection();
    else if (!list.selected.size) pick(list.at);
    openMenu(row ? find(".more", row) : {x: event.clientX, y: event.clientY});
  });
}

// the script stands in the head, so that the colours are chosen before anything is drawn
applyTheme();
addEventListener("DOMContentLoaded", async () => {
  const links = {manifest: "manifest.json", icon: "icon.svg", "apple-touch-icon": "icon-180.png"};
  for (const [rel, name] of Object.entries(links)) document.head.append(h("link", {rel, href: PREFIX + "/" + name}));
  history.scrollRestoration = "manual";
  const about = api("GET", "");                    // on its way together with the words
  about.catch(() => {});
  await setLanguage(language);
  listen();
  start(about);
  const keepers = navigator.serviceWorker;         // in a secure context only; where there is none, nothing is kept
  if (keepers) keepers.register(PREFIX + "/service-worker.js").then(one => one.update()).catch(() => {});
});
"""

PAGE_GERMAN = r"""{
  "10 characters or more": "10 Zeichen oder mehr",
  "A device wants to see and change the files of {name}. Grant it only if you started this yourself, just now.": "Ein Gerät möchte die Dateien von {name} sehen und ändern. Gewähre es nur, wenn du das gerade selbst begonnen hast.",
  "A device was added: {name}": "Ein Gerät kam hinzu: {name}",
  "A device was held: it deletes or overwrites too much": "Ein Gerät wurde angehalten: Es löscht oder überschreibt zu viel",
  "A device was removed: {name}": "Ein Gerät wurde entfernt: {name}",
  "A held device was allowed to go on": "Ein angehaltenes Gerät durfte weitermachen",
  "A name cannot be empty and cannot hold a slash.": "Ein Name darf nicht leer sein und keinen Schrägstrich enthalten.",
  "A password for each device": "Ein Passwort für jedes Gerät",
  "A phone cannot reach {host}: open this page by the address that this computer has in your network.": "Ein Handy erreicht {host} nicht: Öffne diese Seite unter der Adresse, die dieser Rechner in deinem Netz hat.",
  "A star marks what you want to find again.": "Ein Stern zeigt, was du wiederfinden willst.",
  "A version with a name is never removed by itself.": "Eine Version mit Namen wird nie von selbst entfernt.",
  "APP-PASSWORD": "APP-PASSWORT",
  "Account": "Konto",
  "Accounts": "Konten",
  "Actions": "Aktionen",
  "Actions for {name}": "Aktionen für {name}",
  "Activity": "Aktivität",
  "Add something with “New”.": "Füge mit „Neu“ etwas hinzu.",
  "Added:": "Neu:",
  "Administrator": "Verwaltung",
  "Administrator no more": "Nicht mehr Verwaltung",
  "All devices": "Alle Geräte",
  "All folders": "Alle Ordner",
  "All uploads": "Alle Uploads",
  "Allow": "Erlauben",
  "Already there": "Schon da",
  "An app for WebDAV, as Documents (iOS) or Material Files (Android): this address, your name, the app password.": "In einer App, die WebDAV spricht, etwa Documents (iOS) oder Material Files (Android): diese Adresse, dein Name und das App-Passwort.",
  "An upload was broken off": "Ein Upload wurde abgebrochen",
  "Another program has this file locked at the moment.": "Ein anderes Programm hat diese Datei gerade gesperrt.",
  "Any key or click ends the slideshow.": "Jede Taste und jeder Klick beendet die Diaschau.",
  "Any kind": "Jede Art",
  "Any size": "Jede Größe",
  "Any time": "Jederzeit",
  "App password": "App-Passwort",
  "Archives": "Archive",
  "As it was on {when}": "Wie es am {when} war",
  "Asked": "Gefragt",
  "Back": "Zurück",
  "Back to now": "Zurück zu jetzt",
  "Before this year": "Vor diesem Jahr",
  "Bring back": "Zurückholen",
  "Bring it back": "Zurückholen",
  "Bring this time back": "Diesen Stand zurückholen",
  "Bring this time back?": "Diesen Stand zurückholen?",
  "Browser": "Browser",
  "Cancel": "Abbrechen",
  "Cancelled": "Abgebrochen",
  "Cannot reach the server": "Server nicht erreichbar",
  "Change": "Ändern",
  "Change password": "Passwort ändern",
  "Change {name}": "{name} ändern",
  "Changed": "Geändert",
  "Choose": "Auswählen",
  "Choose a name and a password for the first account. It may do everything, also make further accounts.": "Wähle Name und Passwort für das erste Konto. Es darf alles, auch weitere Konten anlegen.",
  "Choose again": "Noch einmal wählen",
  "Choose one more": "Eines mehr auswählen",
  "Choose several": "Mehrere auswählen",
  "Choose the same files again: it goes on, and what is there is not sent twice.": "Wähle dieselben Dateien noch einmal: Es geht weiter, und was da ist, wird nicht noch einmal gesendet.",
  "Clear": "Aufheben",
  "Clear the filters": "Filter aufheben",
  "Clear the selection": "Auswahl aufheben",
  "Close": "Schließen",
  "Code": "Code",
  "Code to scan": "Code zum Scannen",
  "Colours": "Farben",
  "Compared with now": "Verglichen mit jetzt",
  "Comparing…": "Wird verglichen …",
  "Connect": "Verbinden",
  "Contents only": "Nur Inhalte",
  "Continue": "Weiter",
  "Copied.": "Kopiert.",
  "Copy": "Kopieren",
  "Copy address": "Adresse kopieren",
  "Copy curl command": "curl-Befehl kopieren",
  "Copy here": "Hierher kopieren",
  "Copy this": "Kopiere dies",
  "Copy to…": "Kopieren nach …",
  "Copy {what} to": "{what} kopieren nach",
  "Create": "Anlegen",
  "Create account": "Konto anlegen",
  "Cut": "Ausschneiden",
  "Dark": "Dunkel",
  "Days that versions and deleted files are kept": "Tage, die Versionen und Gelöschtes bleiben",
  "Delete": "Löschen",
  "Delete for good": "Endgültig löschen",
  "Delete for good?": "Endgültig löschen?",
  "Delete something and empty the trash, or choose less.": "Lösche etwas und leere den Papierkorb, oder wähle weniger aus.",
  "Deleted": "Gelöscht",
  "Deleted things stay here until their time is over or the trash is emptied.": "Gelöschtes bleibt hier, bis seine Zeit um ist oder der Papierkorb geleert wird.",
  "Device": "Gerät",
  "Devices": "Geräte",
  "Discard it": "Verwerfen",
  "Disk used": "Belegte Festplatte",
  "Do not save": "Nicht speichern",
  "Do the same for all others": "Für alle weiteren genauso",
  "Do the same for {n} more": "Für {n} weitere genauso",
  "Documents": "Dokumente",
  "Done": "Fertig",
  "Download": "Herunterladen",
  "Download this folder": "Diesen Ordner herunterladen",
  "Drop files here, or add something with “New”.": "Zieh Dateien hierher oder füge mit „Neu“ etwas hinzu.",
  "Drop it to upload it to {place}": "Lass es los, um es nach {place} hochzuladen",
  "Earlier": "Früher",
  "Earlier versions": "Frühere Versionen",
  "Edit": "Bearbeiten",
  "Empty the trash": "Papierkorb leeren",
  "Empty the trash?": "Papierkorb leeren?",
  "Ends": "Ende",
  "Ends after 30 days": "Endet nach 30 Tagen",
  "Ends after 7 days": "Endet nach 7 Tagen",
  "Ends after a year": "Endet nach einem Jahr",
  "Enter": "Eingabe",
  "Esc": "Esc",
  "Every device has to log in again after this.": "Danach müssen sich alle Geräte neu anmelden.",
  "Everything": "Alles",
  "Everywhere": "Überall",
  "Exact time": "Genaue Zeit",
  "Failed": "Fehlgeschlagen",
  "Files": "Dateien",
  "Find": "Suchen nach",
  "Find and replace": "Suchen und ersetzen",
  "First number": "Erste Nummer",
  "Folders": "Ordner",
  "Free on disk": "Frei auf der Platte",
  "From": "Von",
  "From a command line:": "Von der Kommandozeile:",
  "Give up": "Aufgeben",
  "Go on editing": "Weiter bearbeiten",
  "Grant access": "Zugang gewähren",
  "Grant access?": "Zugang gewähren?",
  "How": "Wie",
  "If the device shows a code, it has to be the same.": "Wenn das Gerät einen Code zeigt, muss es derselbe sein.",
  "If you save now, it is there again.": "Wenn du jetzt speicherst, ist sie wieder da.",
  "Images": "Bilder",
  "In": "Worin",
  "In the Explorer: This PC, “Map network drive”; or as below. Windows wants HTTPS for it.": "Im Explorer: Dieser PC, „Netzlaufwerk verbinden“; oder wie hier. Windows will dafür HTTPS.",
  "In the Finder: Go, “Connect to Server”, with this address:": "Im Finder: Gehe zu, „Mit Server verbinden“, mit dieser Adresse:",
  "In the file manager, as the address of a server:": "Im Dateimanager als Adresse eines Servers:",
  "In {name}": "In {name}",
  "Install the Nextcloud app, choose “Log in”, and scan this code or type the address.": "Installiere die Nextcloud-App, wähle „Anmelden“ und scanne diesen Code oder tippe die Adresse.",
  "Install the Nextcloud app. Make an app password above, and here is a code for it to scan.": "Installiere die Nextcloud-App. Lege oben ein App-Passwort an, dann steht hier ein Code für sie zum Scannen.",
  "It asks from": "Es fragt von",
  "It asks from another network than the one you are in.": "Es fragt aus einem anderen Netz als dem, in dem du bist.",
  "It calls itself": "Es nennt sich",
  "It changed since you opened it. If you save now, their version stays among the versions.": "Sie hat sich geändert, seit du sie geöffnet hast. Wenn du jetzt speicherst, bleibt die andere Fassung unter den Versionen.",
  "It goes on by itself when the connection is back.": "Es geht von selbst weiter, sobald die Verbindung wieder da ist.",
  "It was moved, renamed or deleted, or it is somebody else's.": "Es wurde verschoben, umbenannt oder gelöscht, oder es gehört jemand anderem.",
  "Just now": "Gerade eben",
  "Keep": "Behalten",
  "Keep both": "Beide behalten",
  "Keep for good": "Dauerhaft behalten",
  "Keep the endings of files": "Endungen der Dateien behalten",
  "Keeps a folder of your computer and this server the same, both ways.": "Hält einen Ordner deines Rechners und diesen Server gleich, in beide Richtungen.",
  "Keyboard shortcuts": "Tastenkürzel",
  "Kind": "Art",
  "Language": "Sprache",
  "Last 30 days": "Letzte 30 Tage",
  "Last 7 days": "Letzte 7 Tage",
  "Later": "Später",
  "Leave": "Verlassen",
  "Leave without saving?": "Verlassen, ohne zu speichern?",
  "Let go": "Freigeben",
  "Light": "Hell",
  "Like the system": "Wie das System",
  "Lines added: {added}, removed: {removed}": "Zeilen neu: {added}, entfernt: {removed}",
  "List": "Liste",
  "Log in": "Anmelden",
  "Log out": "Abmelden",
  "Look everywhere": "Überall suchen",
  "Look in the trash": "Im Papierkorb nachsehen",
  "Main": "Hauptmenü",
  "Make administrator": "Zur Verwaltung machen",
  "Make an app password": "App-Passwort anlegen",
  "May only read": "Darf nur lesen",
  "Modified": "Geändert",
  "More": "Mehr",
  "Move here": "Hierher verschieben",
  "Move to…": "Verschieben nach …",
  "Move {what} to": "{what} verschieben nach",
  "Music": "Musik",
  "Name": "Name",
  "Name of the device": "Name des Geräts",
  "Names and contents": "Namen und Inhalte",
  "Names only": "Nur Namen",
  "Never ends": "Endet nie",
  "New": "Neu",
  "New account": "Neues Konto",
  "New folder": "Neuer Ordner",
  "New name": "Neuer Name",
  "New names": "Neue Namen",
  "New password": "Neues Passwort",
  "New password again": "Neues Passwort noch einmal",
  "New text file": "Neue Textdatei",
  "Next": "Weiter",
  "No connection: {done} of {n} uploaded": "Keine Verbindung: {done} von {n} hochgeladen",
  "No folders in here": "Keine Ordner hierin",
  "Nobody can log in with it any more. Its files go after a while.": "Niemand kann sich damit mehr anmelden. Die Dateien verschwinden nach einer Weile.",
  "Not enough room": "Nicht genug Platz",
  "Not set up yet": "Noch nicht eingerichtet",
  "Note": "Notiz",
  "Nothing found": "Nichts gefunden",
  "Nothing found for “{q}”": "Nichts gefunden zu „{q}“",
  "Nothing has changed since then.": "Seither hat sich nichts geändert.",
  "Nothing here yet": "Noch nichts hier",
  "Nothing starred yet": "Noch nichts markiert",
  "Nothing uploaded": "Nichts hochgeladen",
  "Nothing was here then": "Damals war hier nichts",
  "Now": "Jetzt",
  "Number": "Nummerieren",
  "One moment…": "Einen Moment …",
  "One of these lies in the other.": "Eins davon liegt im anderen.",
  "Only the first {n} are shown.": "Nur die ersten {n} sind zu sehen.",
  "Only the first {n} are shown: narrow it down.": "Nur die ersten {n} sind zu sehen: Grenze es ein.",
  "Only the first {n} rows are shown.": "Nur die ersten {n} Zeilen sind zu sehen.",
  "Only this folder": "Nur dieser Ordner",
  "Only {name}": "Nur {name}",
  "Open": "Öffnen",
  "Open in a new tab": "In neuem Tab öffnen",
  "Other": "Anderes",
  "Other programs get a password of their own, which you can revoke under “Devices”.": "Andere Programme bekommen ein eigenes Passwort, das du unter „Geräte“ sperren kannst.",
  "Over 1 GB": "Über 1 GB",
  "Over 10 MB": "Über 10 MB",
  "Over 100 MB": "Über 100 MB",
  "PDF": "PDF",
  "Password": "Passwort",
  "Password again": "Passwort noch einmal",
  "Paste": "Einfügen",
  "Pattern; # is where the number goes": "Muster; # steht für die Nummer",
  "Pause": "Anhalten",
  "Paused: {done} of {n} uploaded": "Angehalten: {done} von {n} hochgeladen",
  "Phone or tablet: WebDAV": "Handy oder Tablet: WebDAV",
  "Phone or tablet: photos and files": "Handy oder Tablet: Fotos und Dateien",
  "Photo": "Foto",
  "Play on: {name}": "Danach: {name}",
  "Please log in again": "Bitte neu anmelden",
  "Present password": "Bisheriges Passwort",
  "Preview": "Vorschau",
  "Quota in GB; empty is no limit": "Speicher in GB; leer heißt unbegrenzt",
  "Quota of new accounts in GB; empty is no limit": "Speicherplatz neuer Konten in GB; leer heißt keine Grenze",
  "Recently": "Kürzlich",
  "Record a video": "Video aufnehmen",
  "Regular expression": "Regulärer Ausdruck",
  "Remove": "Entfernen",
  "Remove star": "Markierung entfernen",
  "Remove the account {name}?": "Das Konto {name} entfernen?",
  "Removed:": "Entfernt:",
  "Rename": "Umbenennen",
  "Rename {n} items": "{n} Elemente umbenennen",
  "Renamed to “{name}”": "Umbenannt in „{name}“",
  "Replace": "Ersetzen",
  "Replace with": "Ersetzen durch",
  "Restore": "Wiederherstellen",
  "Restored to {place}": "Wiederhergestellt in {place}",
  "Resume": "Fortsetzen",
  "Retry": "Noch einmal",
  "Retry all": "Alle wiederholen",
  "Revoke": "Sperren",
  "Revoke what you do not use any more: it is locked out at once.": "Sperre, was du nicht mehr benutzt: es verliert sofort den Zugang.",
  "Revoke {name}": "{name} sperren",
  "Save": "Speichern",
  "Save mine": "Meine speichern",
  "Saved.": "Gespeichert.",
  "Screenshot": "Bildschirmfoto",
  "Search": "Suchen",
  "See it as it was…": "Ansehen, wie es war …",
  "Select all": "Alle auswählen",
  "Select {name}": "{name} auswählen",
  "Server": "Server",
  "Set a new password": "Neues Passwort setzen",
  "Set the quota": "Speicher festlegen",
  "Settings": "Einstellungen",
  "Shift": "Umschalt",
  "Show as text": "Als Text zeigen",
  "Show in its folder": "Im Ordner zeigen",
  "Show more": "Mehr zeigen",
  "Show what is there now": "Zeigen, was jetzt da ist",
  "Size": "Größe",
  "Skip": "Überspringen",
  "Skip to the files": "Zu den Dateien",
  "Skipped": "Übersprungen",
  "Slideshow": "Diaschau",
  "Somebody changed this file; you see it as it is now.": "Jemand hat diese Datei geändert; du siehst sie, wie sie jetzt ist.",
  "Somebody changed this in the meantime.": "Jemand hat das inzwischen geändert.",
  "Somebody deleted this file": "Jemand hat diese Datei gelöscht",
  "Somebody else saved this file": "Jemand anderes hat diese Datei gespeichert",
  "Somebody else saved this file.": "Jemand anderes hat diese Datei gespeichert.",
  "Somebody moved or deleted this file.": "Jemand hat diese Datei verschoben oder gelöscht.",
  "Something went wrong on the server. Whoever runs it should look at its log.": "Auf dem Server ging etwas schief. Wer ihn betreibt, sollte ins Protokoll sehen.",
  "Sort by {what}": "Nach {what} ordnen",
  "Space": "Leertaste",
  "Star": "Markieren",
  "Star removed from {what}": "{what} nicht mehr markiert",
  "Starred": "Markiert",
  "Start again in the program that sent you here.": "Fang in dem Programm, das dich hergeschickt hat, noch einmal an.",
  "State": "Zustand",
  "Storage": "Speicher",
  "Storage used": "Belegter Speicher",
  "Synchronised folder": "Abgeglichener Ordner",
  "Tables": "Tabellen",
  "Take a photo": "Foto aufnehmen",
  "Taken back.": "Zurückgenommen.",
  "Texts": "Texte",
  "That is too long ago: the history does not reach back so far.": "Das ist zu lange her: So weit reicht der Verlauf nicht zurück.",
  "The disk of the server is almost full; it takes nothing new until there is room.": "Die Platte des Servers ist fast voll; er nimmt nichts Neues an, bis wieder Platz ist.",
  "The most they may take per account, in GB; empty is no limit": "Höchstens je Konto, in GB; leer heißt keine Grenze",
  "The server": "Der Server",
  "The server cannot be reached. Check the connection and try again.": "Der Server ist nicht erreichbar. Prüfe die Verbindung und versuche es noch einmal.",
  "The server cannot write at the moment.": "Der Server kann gerade nichts speichern.",
  "The server could not read all of it. Whoever runs it should look at its log.": "Der Server konnte nicht alles lesen. Wer ihn betreibt, sollte ins Protokoll sehen.",
  "The server is busy. Try again in a moment.": "Der Server ist beschäftigt. Versuche es gleich noch einmal.",
  "The text": "Der Text",
  "The trash is empty": "Der Papierkorb ist leer",
  "The two passwords differ.": "Die beiden Passwörter sind verschieden.",
  "There is no preview of this kind of file.": "Für diese Art von Datei gibt es keine Vorschau.",
  "There is no room for {names}.": "Kein Platz ist für {names}.",
  "There is something of that name already.": "Etwas mit diesem Namen gibt es schon.",
  "These two are too different to be compared line by line.": "Diese beiden sind zu verschieden, um sie Zeile für Zeile zu vergleichen.",
  "This browser cannot play this kind of file.": "Dieser Browser kann Dateien dieser Art nicht abspielen.",
  "This browser cannot show this kind of picture.": "Dieser Browser kann Bilder dieser Art nicht zeigen.",
  "This browser plays only the sound of this film.": "Dieser Browser spielt von diesem Film nur den Ton.",
  "This file cannot be edited here.": "Diese Datei lässt sich hier nicht bearbeiten.",
  "This file is empty.": "Diese Datei ist leer.",
  "This file is larger than the server accepts.": "Diese Datei ist größer, als der Server annimmt.",
  "This file was changed since it was chosen. Choose it again.": "Diese Datei wurde seit der Auswahl verändert. Wähle sie noch einmal aus.",
  "This is not UTF-8; that it is {name} is a guess.": "Das ist kein UTF-8; dass es {name} ist, ist geraten.",
  "This is not a regular expression.": "Das ist kein regulärer Ausdruck.",
  "This is not allowed.": "Das ist nicht erlaubt.",
  "This is not there any more.": "Das gibt es nicht mehr.",
  "This is what you typed before and did not save.": "Das hast du früher getippt und nicht gespeichert.",
  "This link has expired": "Dieser Link ist abgelaufen",
  "This needs your password once more.": "Dafür ist noch einmal dein Passwort nötig.",
  "This needs {need}, but {left} is all that is left: {lack} is missing.": "Gebraucht werden {need}, frei sind nur noch {left}: Es fehlen {lack}.",
  "This one": "Dieses hier",
  "This password is shown only now; it stands in the commands below.": "Dieses Passwort wird nur jetzt gezeigt; es steht in den Befehlen unten.",
  "This server is not set up yet. Open the link that it printed when it started.": "Dieser Server ist noch nicht eingerichtet. Öffne den Link, den er beim Start ausgegeben hat.",
  "This server takes files of up to {size}.": "Dieser Server nimmt Dateien bis {size} an.",
  "This version is the present one now; the others stay.": "Diese Version gilt jetzt; die anderen bleiben erhalten.",
  "This year": "Dieses Jahr",
  "Tiles": "Kacheln",
  "Time": "Zeit",
  "To the files": "Zu den Dateien",
  "Today": "Heute",
  "Too many tries. Wait {time}, then try again.": "Zu viele Versuche. Warte {time}, dann versuch es noch einmal.",
  "Trash": "Papierkorb",
  "Try again": "Noch einmal versuchen",
  "Type what you look for, or choose a filter.": "Tippe, was du suchst, oder wähle einen Filter.",
  "Under 1 MB": "Unter 1 MB",
  "Under the name": "Unter dem Namen",
  "Undo": "Rückgängig",
  "Undone, except {n} that changed since.": "Rückgängig gemacht, außer {n}, die sich seither geändert haben.",
  "Undone.": "Rückgängig gemacht.",
  "Until": "Bis",
  "Upload a folder": "Ordner hochladen",
  "Upload files": "Dateien hochladen",
  "Upload the others": "Die anderen hochladen",
  "Uploading: {done} of {n}, {percent} %": "Hochladen: {done} von {n}, {percent} %",
  "Uploading…": "Wird hochgeladen …",
  "Uploads": "Uploads",
  "Version": "Version",
  "Versions": "Versionen",
  "Versions of {name}": "Versionen von {name}",
  "Video": "Video",
  "Videos": "Videos",
  "View": "Ansicht",
  "Waiting": "Wartet",
  "Waiting for the connection…": "Wartet auf die Verbindung …",
  "Ways to connect": "Wege zum Verbinden",
  "Welcome": "Willkommen",
  "What": "Was",
  "What changed": "Was sich änderte",
  "What is in it cannot be brought back after this.": "Sein Inhalt lässt sich danach nicht zurückholen.",
  "What is kept": "Was aufgehoben wird",
  "What is older goes for good; of what is more than the most, the oldest goes first.": "Was älter ist, geht endgültig; wird es mehr als das Höchste, geht das Älteste zuerst.",
  "What should happen with the new one?": "Was soll mit dem Neuen geschehen?",
  "What you typed is lost then.": "Was du getippt hast, ist dann verloren.",
  "Where": "Wo",
  "Where you are": "Wo du bist",
  "Where you are logged in": "Wo du angemeldet bist",
  "Wrong name or password.": "Name oder Passwort ist falsch.",
  "You are offline": "Du bist offline",
  "You can close this window now.": "Du kannst dieses Fenster jetzt schließen.",
  "You changed this text.": "Du hast diesen Text geändert.",
  "Your password, please": "Dein Passwort, bitte",
  "Your session has ended.": "Deine Sitzung ist zu Ende.",
  "Your storage is full. Delete something, then empty the trash, or ask for more.": "Dein Speicher ist voll. Lösche etwas und leere den Papierkorb, oder bitte um mehr.",
  "a password has 10 to 1024 characters": "ein Passwort hat 10 bis 1024 Zeichen",
  "added": "hinzugefügt",
  "added {when}": "hinzugefügt {when}",
  "and {n} more": "und {n} weitere",
  "another one still has it: rename in two steps": "hat ein anderes noch: in zwei Schritten umbenennen",
  "cannot be a name": "kann kein Name sein",
  "changed": "geändert",
  "deleted": "gelöscht",
  "everything": "alles",
  "is there already": "gibt es schon",
  "less than a minute left": "noch weniger als eine Minute",
  "moved": "verschoben",
  "one folder": "ein Ordner",
  "reads and changes": "liest und ändert",
  "reads only": "liest nur",
  "that password is too easy to guess": "dieses Passwort ist zu leicht zu erraten",
  "there is an account of that name": "ein Konto mit diesem Namen gibt es schon",
  "this setup link is not valid any more": "dieser Link zum Einrichten gilt nicht mehr",
  "twice the same": "zweimal der gleiche",
  "used {when}": "benutzt {when}",
  "{free} of {total}": "{free} von {total}",
  "{how} since": "seither {how}",
  "{name} and {n} more were not sent.": "{name} und {n} weitere wurden nicht gesendet.",
  "{name} was not sent.": "{name} wurde nicht gesendet.",
  "{n} %": "{n} %",
  "{n} % are there": "{n} % sind da",
  "{n} B": "{n} B",
  "{n} already there": "{n} schon da",
  "{n} changed since: {how}": "{n} seither anders: {how}",
  "{n} file": "{n} Datei",
  "{n} file is too large": "{n} Datei ist zu groß",
  "{n} file uploaded": "{n} Datei hochgeladen",
  "{n} files": "{n} Dateien",
  "{n} files are too large": "{n} Dateien sind zu groß",
  "{n} files uploaded": "{n} Dateien hochgeladen",
  "{n} folder": "{n} Ordner",
  "{n} folders": "{n} Ordner",
  "{n} hours left": "noch {n} Stunden",
  "{n} item": "{n} Element",
  "{n} item renamed": "{n} Element umbenannt",
  "{n} item restored": "{n} Element wiederhergestellt",
  "{n} items": "{n} Elemente",
  "{n} items renamed": "{n} Elemente umbenannt",
  "{n} items restored": "{n} Elemente wiederhergestellt",
  "{n} line unchanged": "{n} Zeile unverändert",
  "{n} lines unchanged": "{n} Zeilen unverändert",
  "{n} minute": "{n} Minute",
  "{n} minute ago": "vor {n} Minute",
  "{n} minute left": "noch {n} Minute",
  "{n} minutes": "{n} Minuten",
  "{n} minutes ago": "vor {n} Minuten",
  "{n} minutes left": "noch {n} Minuten",
  "{n} name changes": "{n} Name ändert sich",
  "{n} name does not work": "{n} Name geht nicht",
  "{n} names change": "{n} Namen ändern sich",
  "{n} names do not work": "{n} Namen gehen nicht",
  "{n} of {all}": "{n} von {all}",
  "{n} second": "{n} Sekunde",
  "{n} seconds": "{n} Sekunden",
  "{n} selected": "{n} ausgewählt",
  "{n} upload failed": "{n} Upload fehlgeschlagen",
  "{n} uploads failed": "{n} Uploads fehlgeschlagen",
  "{n} version": "{n} Version",
  "{n} versions": "{n} Versionen",
  "{sent} of {size}": "{sent} von {size}",
  "{size}/s, {time}": "{size}/s, {time}",
  "{used} of {quota} used": "{used} von {quota} belegt",
  "{used} used": "{used} belegt",
  "{what} becomes what it was on {when}. {n} thing changes; you can undo this.": "{what} wird, was es am {when} war. {n} Ding ändert sich; das lässt sich rückgängig machen.",
  "{what} becomes what it was on {when}. {n} things change; you can undo this.": "{what} wird, was es am {when} war. {n} Dinge ändern sich; das lässt sich rückgängig machen.",
  "{what} brought back": "{what} zurückgeholt",
  "{what} cannot be brought back after this.": "{what} lässt sich danach nicht zurückholen.",
  "{what} copied": "{what} kopiert",
  "{what} deleted": "{what} gelöscht",
  "{what} moved": "{what} verschoben",
  "{what} ready to be copied: paste it where you want it.": "{what} zum Kopieren vorgemerkt: Füge es ein, wo du es haben willst.",
  "{what} ready to be moved: paste it where it belongs.": "{what} zum Verschieben vorgemerkt: Füge es ein, wo es hingehört.",
  "{what} starred": "{what} markiert",
  "{who} brought {what} back to an earlier time": "{who} hat {what} auf einen früheren Stand gebracht",
  "{who} changed the password of {name}": "{who} hat das Passwort von {name} geändert",
  "{who} changed the quota of {name}": "{who} hat den Speicherplatz von {name} geändert",
  "{who} changed the rights of {name}": "{who} hat die Rechte von {name} geändert",
  "{who} changed what is kept": "{who} hat geändert, was aufgehoben wird",
  "{who} changed {what}": "{who} hat {what} geändert",
  "{who} copied {what} to {to}": "{who} hat {what} nach {to} kopiert",
  "{who} deleted {what}": "{who} hat {what} gelöscht",
  "{who} emptied the trash": "{who} hat den Papierkorb geleert",
  "{who} locked {what}": "{who} hat {what} gesperrt",
  "{who} made the account {name}": "{who} hat das Konto {name} angelegt",
  "{who} made the folder {what}": "{who} hat den Ordner {what} angelegt",
  "{who} moved {what} to {to}": "{who} hat {what} nach {to} verschoben",
  "{who} removed the account {name}": "{who} hat das Konto {name} entfernt",
  "{who} restored a version of {what}": "{who} hat eine Version von {what} wiederhergestellt",
  "{who} restored {what}": "{who} hat {what} wiederhergestellt",
  "{who} saved {what}": "{who} hat {what} gespeichert",
  "{who} synchronised {what}": "{who} hat {what} abgeglichen",
  "{who} undid a step": "{who} hat einen Schritt rückgängig gemacht",
  "{who} uploaded {what}": "{who} hat {what} hochgeladen",
  "“{name}”": "„{name}“",
  "“{name}” and {n} more": "„{name}“ und {n} weitere",
  "“{name}” exists already": "„{name}“ gibt es schon",
  "“{name}” is held: it wants to delete {deletes} and overwrite {overwrites} files.": "„{name}“ ist angehalten: Es will {deletes} Dateien löschen und {overwrites} überschreiben.",
  "“{name}” is held: it wants to delete {deletes} files.": "„{name}“ ist angehalten: Es will {deletes} Dateien löschen.",
  "“{name}” is held: it wants to overwrite {overwrites} files.": "„{name}“ ist angehalten: Es will {overwrites} Dateien überschreiben.",
  "“{name}” is not there (any more).": "„{name}“ ist nicht (mehr) da.",
  "“{sign}” does not exist in the encoding of this file ({name}).": "„{sign}“ gibt es in der Kodierung dieser Datei nicht ({name})."
}
"""

PAGE_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="light dark">
<title>cloudserver</title>
<style>{style}</style>
<script>{script}</script>
</head>
<body>
<div id="app"></div>
<div class="toasts" role="status"></div>
<noscript>This page needs JavaScript; curl and every WebDAV client work without.</noscript>
</body>
</html>
"""


# What makes small pictures of large ones, in a thread of its own beside the page.
PAGE_PAINTER = r"""
"use strict";

const HEAD = 68 << 10;                 // bytes: what a camera says of a picture is the first segment, at most 64 KiB

// {id, film, file, address, size, most}: a frame of a film, a file at hand, or where to get it.  Answers
// {id, blob, unknown}: no blob if it would cost more than `most` bytes, or if this browser does not know the kind
onmessage = async ({data: {id, film, file, address, size, most}}) => {
  const found = {id};
  try {
    const small = !film && !file && await embedded(address).catch(() => null);
    if (small) found.blob = await shrink(small.picture, small.turn);
    else if (film || file || size <= most)
      found.blob = await shrink(film || await createImageBitmap(file || await (await get(address)).blob()), 1);
  } catch {
    found.unknown = true;
  }
  postMessage(found);
};

async function get(address, fields) {
  const answer = await fetch(address, {headers: {"X-Requested-By": "page", ...fields}});
  if (!answer.ok) throw new Error(answer.status);
  return answer;
}

// the small picture that cameras put into the head of a JPEG (Exif 2.32 s4.5.8), and how it is to be turned
async function embedded(address) {
  const view = new DataView(await (await get(address, {Range: `bytes=0-${HEAD - 1}`})).arrayBuffer());
  if (view.getUint16(0) !== 0xffd8) return null;
  for (let at = 2; view.getUint16(at) !== 0xffda; at += 2 + view.getUint16(at + 2)) {
    const isExif = view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966;
    if (isExif) return readExif(new DataView(view.buffer, at + 10));
  }
  return null;
}

async function readExif(view) {
  const little = view.getUint16(0) === 0x4949;
  const two = at => view.getUint16(at, little), four = at => view.getUint32(at, little);
  const read = at => {                 // {tag: value}, and where the next table is
    const rows = Array.from({length: two(at)}, (_, n) => at + 2 + 12 * n);
    const found = rows.map(row => [two(row), two(row + 2) === 3 ? two(row + 8) : four(row + 8)]);
    return {...Object.fromEntries(found), next: four(at + 2 + 12 * rows.length)};
  };
  const {next, 0x112: turn = 1} = read(four(4)), {0x201: start, 0x202: length} = next ? read(next) : {};
  if (!length) return null;
  const bytes = new Uint8Array(view.buffer, view.byteOffset + start, length);
  return {turn, picture: await createImageBitmap(new Blob([bytes], {type: "image/jpeg"}))};
}

// what an orientation means for a picture of w x h (Exif 2.32 s4.6.4): the matrix that puts it upright
const TURNS = {2: (w, h) => [-1, 0, 0, 1, w, 0], 3: (w, h) => [-1, 0, 0, -1, w, h], 4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0], 6: (w, h) => [0, 1, -1, 0, h, 0], 7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w, h) => [0, -1, 1, 0, 0, w]};

// at most 400 pixels on the short side, and fewer until few bytes tell it
async function shrink(picture, turn) {
  let blob;
  for (let side = 400; !blob || blob.size > 64 << 10; side *= 0.8) {
    const scale = Math.min(1, side / Math.min(picture.width, picture.height));
    const size = [picture.width, picture.height].map(length => Math.max(1, Math.floor(length * scale)));
    const canvas = new OffscreenCanvas(...turn > 4 ? [...size].reverse() : size), paint = canvas.getContext("2d");
    if (TURNS[turn]) paint.setTransform(...TURNS[turn](...size));
    paint.drawImage(picture, 0, 0, ...size);
    blob = await canvas.convertToBlob({type: "image/webp", quality: 0.8});
    if (blob.type !== "image/webp") blob = await canvas.convertToBlob({type: "image/jpeg", quality: 0.8});   // Safari
  }
  picture.close();
  return blob;
}
"""


# What keeps the page at hand when there is no network.  It knows the shell by name, and nothing of what anybody stored.
PAGE_WORKER = r"""
"use strict";

const HOME = new URL("./", location).pathname, KEPT = {kept}, VIEWS = {views}, SHELL = "shell " + HOME + " {version}";

addEventListener("install", event => event.waitUntil(fill().then(() => skipWaiting())));
addEventListener("activate", event => event.waitUntil(tidy().then(() => clients.claim())));
addEventListener("fetch", event => {
  const {method, mode, url} = event.request, {origin, pathname} = new URL(url), name = pathname.slice(HOME.length);
  if (method !== "GET" || origin !== location.origin || !pathname.startsWith(HOME)) return;
  if (mode === "navigate" && VIEWS.includes(name.split("/")[0])) event.respondWith(answer(event.request, ""));
  else if (mode !== "navigate" && KEPT.includes(name)) event.respondWith(answer(event.request, name));
});

// all or nothing, and never what a proxy leads to instead
async function fill() {
  const shell = await caches.open(SHELL);
  for (const name of KEPT) {
    const found = await fetch(HOME + name, {cache: "no-cache", redirect: "error"});
    if (!found.ok) throw new Error(name);
    await shell.put(HOME + name, found);
  }
}

async function tidy() {
  for (const name of await caches.keys())
    if (name.startsWith("shell " + HOME + " ") && name !== SHELL) await caches.delete(name);
}

// the network first; a proxy whose server is away counts as none
async function answer(request, name) {
  const found = await fetch(request).catch(() => null);
  if (found && (found.status < 502 || found.status > 504)) return found;
  const shell = await caches.open(SHELL);
  return await shell.match(HOME + name, {ignoreVary: true}) || found || Response.error();
}
"""


def bare(source: str) -> str:
    """A script or style as it is sent: as it is written, but for indentation, empty lines and comments."""
    return re.sub(r"(?m)^ *(?://.*|/\*.*\*/)?\n|^ +|(?<=\S) +// .*$", "", source)


def source_hash(text: str) -> str:
    """How a Content-Security-Policy names a piece of inline source (CSP3 s2.3.1)."""
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@lru_cache(maxsize=None)
def page_as_sent(packed: bool) -> tuple[bytes, dict[str, str]]:
    """(body, header fields) for a browser that takes gzip or not, made when first asked for; nothing in it is secret (W3)."""
    style, script = bare(PAGE_STYLE), bare(PAGE_SCRIPT)
    page = PAGE_HTML.replace("{style}", style).replace("{script}", script).encode()
    return gzip.compress(page, mtime=0) if packed else page, {
        "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache", "Vary": "Accept-Encoding",
        "ETag": '"%s%s"' % (hashlib.sha256(page).hexdigest()[:16], "-gz" * packed),
        "Content-Security-Policy": "default-src 'none'; script-src %s; style-src %s; img-src 'self' blob: data:; "
                                   "media-src 'self' blob:; frame-src blob:; connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
                                   "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; object-src 'none'" % (
                                       source_hash(script), source_hash(style)),
        "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()", **({"Content-Encoding": "gzip"} if packed else {})}


def web_page(cloud: Cloud, who: Principal, request: Request, path: tuple[str, ...] = (), token: str = "") -> Response:
    """The page; what it shows is up to its script, which reads the address."""
    body, fields = page_as_sent(takes_gzip(request.fields.get("accept-encoding", "")))
    if request["if-none-match"] == fields["ETag"]:
        return Response(304, b"", {name: value for name, value in fields.items() if name != "Content-Encoding"})
    return Response(200, body, dict(fields))


for _pattern in ("/", "/setup", "/login", "/files/<path>", "/past/<path>", "/versions/<path>", "/starred", "/trash", "/activity",
                 "/search", "/settings/<path>", "/login/v2/flow/<token>"):
    route("GET", _pattern, needs="nothing")(web_page)


WORDS = {"de": PAGE_GERMAN}       # what the page says in other languages, JSON: another one is another row here and in LANGUAGES


@route("GET", "/words/<language>", needs="nothing", packs=True)
def web_words(cloud: Cloud, who: Principal, request: Request, language: str) -> Response:
    """{what the page says in English: the same in another language}"""
    if language not in WORDS:
        raise CloudError("not-found")
    body = WORDS[language].encode()
    return page_part(request, body, "application/json; charset=utf-8")


def page_part(request: Request, body: bytes, media: str, **fields: str) -> Response:
    """A public piece of the page, asked for anew each time and sent only when it changed."""
    return kept_response(request, body, {"Content-Type": media, "Cache-Control": "no-cache", **fields})


ICON = (b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><rect width="24" height="24" fill="#1857c4"/><path fill="#fff" '
        b'd="M5 8a1.5 1.5 0 0 1 1.5-1.5h3.600l1.5 2H17.500A1.5 1.5 0 0 1 19 10v6a1.5 1.5 0 0 1-1.5 1.5h-11A1.5 1.5 0 0 1 5 16z"/></svg>')
ICON_SIZES = (180, 192, 512)      # in pixels: what iOS and Android ask for
MANIFEST = {"name": "cloudserver", "short_name": "cloudserver", "lang": "en", "start_url": "./", "scope": "./", "display": "standalone",
            "background_color": "#ffffff", "theme_color": "#1857c4",         # no id: it would not know below which path it is
            "icons": [{"src": "icon.svg", "sizes": "any", "type": "image/svg+xml", "purpose": purpose} for purpose in ("any", "maskable")]
            + [{"src": "icon-%d.png" % size, "sizes": "%dx%d" % (size, size), "type": "image/png", "purpose": purpose}
               for size in ICON_SIZES[1:] for purpose in ("any", "maskable")]}


@route("GET", "/manifest.json", needs="nothing")
def web_manifest(cloud: Cloud, who: Principal, request: Request) -> Response:
    """What a phone wants to know to put the page on its home screen (W3C Web Application Manifest)."""
    return Response(200, format_json(MANIFEST), {"Content-Type": "application/manifest+json", "Cache-Control": "max-age=86400"})


@route("GET", "/service-worker.js", needs="nothing")
def web_worker(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The page's service worker (W3C Service Workers)."""
    return page_part(request, worker_as_sent(), "text/javascript; charset=utf-8",
                     **{"Content-Security-Policy": "default-src 'none'; connect-src 'self'"})


@route("GET", "/painter.js", needs="nothing")
def web_painter(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The page's maker of thumbnails (HTML s10, workers)."""
    return page_part(request, bare(PAGE_PAINTER).encode(), "text/javascript; charset=utf-8",
                     **{"Content-Security-Policy": "default-src 'none'; connect-src 'self'"})


@lru_cache(maxsize=None)
def worker_as_sent() -> bytes:
    """PAGE_WORKER; another page makes another text of it, by which a browser notices."""
    kept = {"": page_as_sent(False)[0], "icon.svg": ICON, "manifest.json": format_json(MANIFEST),
            **{"words/" + language: words.encode() for language, words in WORDS.items()}}
    values = {"kept": json.dumps(list(kept)), "views": json.dumps(page_views()),
              "version": hashlib.sha256(b"".join(kept.values())).hexdigest()[:16]}
    return re.sub(r"\{(kept|views|version)\}", lambda found: values[found[1]], bare(PAGE_WORKER)).encode()


def page_views() -> list[str]:
    """The first names of all addresses that answer with the page."""
    def shows(place: Any) -> bool:
        return place.handler is web_page if isinstance(place, Route) else any(map(shows, place.values()))
    return sorted(name for name, place in ROUTES.items() if shows(place))


@lru_cache(maxsize=None)
def draw_icon(size: int) -> bytes:
    """ICON as a PNG: for each row of pixels where the folder begins and ends, four times, so that its edges are soft."""
    palette = bytes(round(blue + (255 - blue) * share / 255) for share in range(256) for blue in (0x18, 0x57, 0xc4))
    rows = []
    for y in range(size):
        spans = [folder_at((y + (part + 0.5) / 4) * 24 / size) for part in range(4)]
        spans = [(left * size / 24, right * size / 24) for left, right in spans]
        outer, inner = (int(min(spans)[0]), max(right for _, right in spans)), (max(spans)[0], min(right for _, right in spans) - 1)
        rows.append(b"\0" + bytes(0 if not outer[0] <= x <= outer[1] else 255 if inner[0] <= x <= inner[1] else round(255 / 4 * sum(
            min(1, max(0, right - x)) - min(1, max(0, left - x)) for left, right in spans)) for x in range(size)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 3, 0, 0, 0)), (b"PLTE", palette), (b"IDAT", zlib.compress(b"".join(rows), 9)),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                                            for kind, data in chunks)


def folder_at(y: float) -> tuple[float, float]:
    """From where to where the folder of ICON reaches at a height; all of 24."""
    if not 6.5 < y < 17.5:
        return 0, 0
    round_off = lambda beyond: math.sqrt(1.5 ** 2 - max(0, beyond) ** 2)
    return 6.5 - round_off(max(8 - y, y - 16)), 10.1 + 0.75 * (y - 6.5) if y < 8.5 else 17.5 + round_off(max(10 - y, y - 16))


def web_picture(size: int) -> Callable[[Cloud, Principal, Request], Response]:
    """The handler of the icon in a size."""
    return lambda cloud, who, request: Response(200, draw_icon(size), {"Content-Type": "image/png", "Cache-Control": "max-age=86400"})


for _size in ICON_SIZES:
    route("GET", "/icon-%d.png" % _size, needs="nothing")(web_picture(_size))


@route("GET", "/icon.svg", needs="nothing")
def web_icon(cloud: Cloud, who: Principal, request: Request) -> Response:
    """The program's own picture: no user's SVG is ever served as one (W1)."""
    return Response(200, ICON, {"Content-Type": "image/svg+xml", "Cache-Control": "max-age=86400", "Content-Security-Policy": SANDBOX})


# ==== 14. Service ========================================================================
#
# One supervisor, several workers that share the listening socket.  1. The supervisor forks before any database is
# opened for good.  2. A worker ends when its supervisor does.  3. Background jobs run in every worker's janitor, but
# only under a lease, and each of their batches says by its guard that the lease still holds.

STOP_TIME = 8                   # seconds that requests in flight get to finish; who stops a container waits 10
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
LEASE = 2 * MINUTE
WATCHED_MOST = 480 if os.name == "nt" else math.inf      # connections that no thread has; select() on Windows takes 512 sockets in all
CREW_IDLE = 10                  # seconds that a thread waits for work before it ends


class Balance:
    """How many connections each worker holds, in memory they share.  A hint and no more: who has more than another
    leaves a new connection to that one, but not for long."""

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("I")
        self.index = 0                           # which one we are

    def set(self, count: int) -> None:
        self._counts[self.index] = count

    def yields(self) -> bool:
        """Should another worker take the next connection?"""
        return self._counts[self.index] > min(self._counts)


class Crew:
    """Threads that take work as it comes; one that finds none for a while ends, so that a rush leaves nothing behind."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self._free = most, 0, 0
        self._lock, self._work = threading.Lock(), queue.SimpleQueue()

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        with self._lock:
            self._work.put((work, args))
            if self._free < self._work.qsize() and self.count < self.most:
                self.count += 1
                threading.Thread(target=self._run, name="connection", daemon=True).start()

    def backlog(self) -> int:
        """How much waits for a thread."""
        return self._work.qsize()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._free += 1
            try:
                work, args = self._work.get(timeout=CREW_IDLE)
            except queue.Empty:
                work = None
            with self._lock:
                self._free -= 1
                if work is None and not self._work.qsize():
                    self.count -= 1
                    return
            if work is not None:
                work(*args)


class CloudServer(ThreadingHTTPServer):
    """One process that serves: accepts connections, watches those that nothing can be done for yet, gives the others a thread.

    Nobody who is slow or silent has a thread: a handshake, a head, a small body of a stranger and an answer that a stranger
    takes slowly are moved along here, without ever waiting (R32).
    """
    daemon_threads = True

    def __init__(self, cloud: Cloud, listener: socket.socket, lifeline: int | None = None,
                 balance: Balance | None = None) -> None:
        """
        listener    bound and listening; shared with other workers
        lifeline    a descriptor that reads end of file when the supervisor is gone
        """
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.cloud, self.lifeline, self.site = listener, cloud, lifeline, Site(cloud.config)
        self.balance, self._yielded = balance or Balance(1), 0
        self.tls = tls_context(cloud.config)
        self.access_log = AccessLog(cloud.config.access_log) if cloud.config.access_log else None
        self.stopping = False
        self.crew = Crew(THREADS)
        self.returned: deque[Connection] = deque()           # from threads: to be watched again
        self.watched: dict[Connection, None] = {}            # the longest watched first
        self.active: set[Connection] = set()                 # with a thread, or waiting for one
        self.peers: dict[str, int] = {}                      # connections of each network
        self.waker, self.wake = socket.socketpair()
        for end in (self.waker, self.wake):
            end.setblocking(False)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept and watch until stop() is called or the supervisor is gone; then let requests finish."""
        self.socket.setblocking(False)
        with selectors.DefaultSelector() as self.selector:
            for what in (self.socket, self.waker, *([] if self.lifeline is None else [self.lifeline])):
                self.selector.register(what, selectors.EVENT_READ, what)
            swept = time.monotonic()
            while not self.stopping:
                for key, _ in self.selector.select(poll_interval):
                    self._notice(key.data)
                if time.monotonic() - swept > 1:
                    swept = time.monotonic()
                    self._end_phases(swept)
            for connection in list(self.watched):
                self._close(connection)
        until = time.monotonic() + STOP_TIME
        while self.active and time.monotonic() < until:
            time.sleep(0.01)

    def stop(self) -> None:
        self.stopping = True
        self.cloud.closing.set()
        self._wake()

    def is_crowded(self) -> bool:
        """Are threads too dear to wait in for a connection that is silent now?"""
        return self.crew.count > THREADS // 2

    def _wake(self) -> None:
        try:
            self.wake.send(b".")
        except BlockingIOError:
            pass                                 # it is being woken already

    # ---- coming and going

    def _notice(self, what: Any) -> None:
        if isinstance(what, Connection):
            if what in self.watched:             # else it has just been closed
                self._move_along(what)
        elif what is self.socket:
            self._accept()
        elif what is self.waker:
            self.waker.recv(4096)
            while self.returned:
                self._take_back(self.returned.popleft())
        else:
            self.stopping = True                 # the lifeline is cut

    def _accept(self) -> None:
        if self.balance.yields() and self._yielded < 4:
            self._yielded += 1
            time.sleep(0.0005)
            return
        self._yielded = 0
        try:
            sock, address = self.socket.accept()
        except BlockingIOError:
            return                               # another process was faster
        except OSError as error:                 # out of descriptors (R19)
            log.error("accept: %s", error)
            for _ in range(64):
                self._make_room()
            time.sleep(0.05)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, address, HEAD)
        connection.watch()
        if self.tls:
            connection.sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        network = self._network(connection)
        self.peers[network] = self.peers.get(network, 0) + 1
        connection.wait(HANDSHAKE if self.tls else HEAD, HANDSHAKE_TIME if self.tls else IDLE_TIME)
        if len(self.watched) + len(self.active) >= self.cloud.config.max_connections or len(self.watched) >= WATCHED_MOST:
            self._make_room()
        self._watch(connection)
        if not self.tls:
            self._move_along(connection)         # what it wants is often there already

    def _network(self, connection: Connection) -> str:
        """Whom a connection counts for; all of a listed proxy's are many people's."""
        return network_of(connection.peer)

    def _make_room(self) -> None:
        """Close one that has its answer; else what has been silent longest, of the network that has most connections: strangers
        crowd out themselves."""
        oldest: dict[str, Connection] = {}
        for connection in self.watched:
            if connection.phase == LINGER:
                return self._close(connection)
            if connection.phase != SENDING:
                oldest.setdefault(self._network(connection), connection)
        if oldest:
            self._close(oldest[max(oldest, key=self.peers.__getitem__)])

    def _watch(self, connection: Connection) -> None:
        writes = connection.phase == SENDING or connection.phase == HANDSHAKE and connection.writes
        self.watched[connection] = None
        self.selector.register(connection.sock, selectors.EVENT_WRITE if writes else selectors.EVENT_READ, connection)

    def _unwatch(self, connection: Connection) -> None:
        del self.watched[connection]
        self.selector.unregister(connection.sock)

    def _close(self, connection: Connection) -> None:
        if connection in self.watched:
            self._unwatch(connection)
        connection.sock.close()
        network = self._network(connection)
        self.peers[network] -= 1
        if not self.peers[network]:
            del self.peers[network]
        self.balance.set(len(self.active) + len(self.watched))

    # ---- what can be done without waiting

    def _move_along(self, connection: Connection) -> None:
        """Something came, or can go: do what can be done at once."""
        try:
            MOVES[connection.phase](self, connection)
        except OSError:
            self._close(connection)

    def _go_on_with_handshake(self, connection: Connection) -> None:
        self._start(connection)                  # its arithmetic is a thread's work

    def _go_on_receiving(self, connection: Connection) -> None:
        silent = not len(connection.parser)
        came = connection.receive()
        if came is False:
            self._close(connection)
        elif came:
            if connection.is_settled():
                self._start(connection)
            elif silent and connection.phase == HEAD:
                connection.wait(HEAD, HEADER_TIME)           # from its first byte on

    def _go_on_sending(self, connection: Connection) -> None:
        if connection.flush():
            self._unwatch(connection)
            self._go_on_after_answer(connection)

    def _go_on_after_answer(self, connection: Connection) -> None:
        if connection.keep:
            connection.wait(HEAD, IDLE_TIME)
        else:
            connection.half_close()
        self._take_back(connection)

    def _go_on_discarding(self, connection: Connection) -> None:
        with suppress(*SILENT):
            if not connection.sock.recv(RECEIVE):
                self._close(connection)

    def _end_phases(self, now: float) -> None:
        """End what has waited as long as it may."""
        for connection in [connection for connection in self.watched if connection.until < now]:
            if connection.phase == BODY or connection.phase == HEAD and len(connection.parser):
                self._refuse(connection, CloudError("timeout", "the request did not arrive in time"))
            else:
                self._close(connection)

    def _refuse(self, connection: Connection, error: CloudError) -> None:
        """Say a word to a connection that gets no thread, and end it."""
        response = json_error(error, NO_REQUEST)
        connection.out = memoryview(format_head(response, False, False) + response.body)
        with suppress(OSError):
            connection.flush()
        self._close(connection)

    # ---- threads

    def _start(self, connection: Connection) -> None:
        self._unwatch(connection)
        if self.crew.backlog() >= WAITING:
            self._refuse(connection, CloudError("busy", "too many requests at once", retry_after=2))
            return                               # overloaded: better to say so than to let everybody wait (R35)
        self.active.add(connection)
        self.balance.set(len(self.active) + len(self.watched))
        if connection.phase != HANDSHAKE:
            connection.seize()
        self.process_request(connection, connection.peer)

    def process_request(self, request: Connection, client_address: str) -> None:
        self.crew.submit(self.process_request_thread, request, client_address)

    def handle_error(self, request: Connection, client_address: str) -> None:
        log.exception("connection")
        request.phase = CLOSED

    def shutdown_request(self, request: Connection) -> None:
        """A thread is done with a connection, for now or for good."""
        if self.stopping:
            request.sock.close()
            self.active.discard(request)
            return
        request.watch()
        self.returned.append(request)
        self._wake()

    def _take_back(self, connection: Connection) -> None:
        self.active.discard(connection)
        if connection.phase == CLOSED or self.stopping:
            self._close(connection)
            return
        if len(self.watched) >= WATCHED_MOST:
            self._make_room()
        self._watch(connection)
        if isinstance(connection.sock, ssl.SSLSocket) and connection.sock.pending():
            self._move_along(connection)         # the selector does not see what TLS has read already
        elif connection.phase in (HEAD, BODY) and len(connection.parser) and connection.is_settled():
            self._start(connection)

    def log_access(self, request: Request, response: Response, sent: int) -> None:
        if self.access_log:
            self.access_log.write(request, response, sent)


MOVES: dict[int, Callable[[CloudServer, Connection], None]] = {
    HANDSHAKE: CloudServer._go_on_with_handshake, HEAD: CloudServer._go_on_receiving, BODY: CloudServer._go_on_receiving,
    SENDING: CloudServer._go_on_sending, LINGER: CloudServer._go_on_discarding}


SAFE_TLS = {(3, 9): (3, 9, 18), (3, 10): (3, 10, 13), (3, 11): (3, 11, 5)}       # N2: the first versions without the hole


@lru_cache(maxsize=1)
def tls_context(config: Config) -> ssl.SSLContext | None:
    """Read once: who serves may not be who can read the key.  raises CloudError for certificates that cannot be used"""
    if not config.tls_cert:
        return None
    if sys.version_info < SAFE_TLS.get(sys.version_info[:2], (0,)):
        raise CloudError("bad-request", "this Python's TLS has a known hole (CVE-2023-40217); use %s or newer"
                         % ".".join(map(str, SAFE_TLS[sys.version_info[:2]])))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ValueError) as error:
        raise CloudError("bad-request", "cannot use the certificate %s: %s" % (config.tls_cert, error)) from error
    return context


# ---- logs

class AccessLog:
    """Who asked for what, in the combined format; queries, which may hold secrets, are left out (L1, L4)."""
    LIMIT, KEPT = 16 * MiB, 4

    def __init__(self, target: str) -> None:
        self.path = None if target == "-" else Path(target)
        self._fd, self._lock = -1 if self.path else 1, threading.Lock()
        self._limit = self.LIMIT                 # size at which a new file is due
        if self.path:
            self._open()

    def close(self) -> None:
        if self.path:
            os.close(self._fd)

    def reopen(self) -> None:
        """Go on in the file that has the name now: after somebody else moved ours away."""
        with self._lock, suppress(OSError):
            if self.path:
                self._open()

    def _open(self) -> None:
        before, self._fd = self._fd, os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | O_EXTRA, 0o600)
        if before >= 0:
            os.close(before)

    def write(self, request: Request, response: Response, sent: int) -> None:
        line = '%s - %s [%s] "%s %s HTTP/1.%d" %d %d "-" "%s"\n' % (
            printable(request.address), printable(request.who.name) or "-", time.strftime("%d/%b/%Y:%H:%M:%S %z"), request.method,
            format_path(loggable(request.path)), request.minor, response.status, sent,
            printable(request.fields.get("user-agent", "-")))
        with self._lock, suppress(OSError):      # failing to log never fails a request
            if self._fd < 0:
                self._open()
            os.write(self._fd, line.encode("utf-8", "replace"))          # one call, appended whole
            size = os.fstat(self._fd).st_size if self.path else 0
            if size > self._limit:
                self._limit = size + self.LIMIT // 16                    # if it cannot be moved now, not at once again
                self._rotate()
                self._limit = self.LIMIT

    def _rotate(self) -> None:
        """Start a new file; another process may have done so already.  raises OSError; then nothing was moved"""
        names = [self.path, *(self.path.with_name("%s.%d" % (self.path.name, number)) for number in range(self.KEPT + 1))]
        ours = self.path.exists() and os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        os.close(self._fd)                       # Windows renames no open file
        self._fd = -1
        try:
            if ours:
                os.replace(names[0], names[1])   # the one that can fail, because somebody else reads it, comes first
                for older, oldest in reversed(list(zip(names[1:], names[2:]))):
                    if older.exists():
                        os.replace(older, oldest)
        finally:
            self._open()


def printable(text: str) -> str:
    """Text that can neither start a line nor a terminal escape, at most 1 KiB of it (L2)."""
    return "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text[:1024])


class JsonFormatter(logging.Formatter):
    """One event, one line of JSON, control characters escaped (L2)."""

    def format(self, record: logging.LogRecord) -> str:
        event = {"at": format_time(int(record.created * 1000)), "level": record.levelname.lower(),
                 "event": record.getMessage()[:1024]}
        event.update((name, str(getattr(record, name))[:1024]) for name in ("account", "address", "by") if hasattr(record, name))
        if record.exc_info:
            event["trace"] = self.formatException(record.exc_info)[-4096:]
        return json.dumps(event)


class SentenceFormatter(logging.Formatter):
    """The same for eyes: a sentence, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        about = ["%s %s" % (name, getattr(record, name)) for name in ("account", "address", "by") if hasattr(record, name)]
        lines = [record.getMessage() + (" (%s)" % ", ".join(about) if about else "")]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        return "\n".join("".join(c if c.isprintable() else "?" for c in line[:1024]) for line in lines)


def start_logging(config: Config) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(SentenceFormatter() if sys.stderr.isatty() else JsonFormatter())
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if config.quiet else logging.INFO)


# ---- what goes on in the background

KEEP_CONDEMNED = DAY            # a chunk nobody refers to waits this long, then its row goes
KEEP_BURIED = DAY               # ... and this long, longer than any download, then its object
KEEP_ORPHANS = 7 * DAY          # objects no row knows: longer than any upload
LADDER = ((365 * DAY, 7 * DAY), (5 * 365 * DAY, 30 * DAY))      # past --keep-days: (versions this old, one in each span)
REFERRED = ("(EXISTS (SELECT 1 FROM entry WHERE manifest = chunk.hash) "
            "OR EXISTS (SELECT 1 FROM manifest_chunk m WHERE m.chunk = chunk.hash) "
            "OR EXISTS (SELECT 1 FROM upload_chunk u WHERE u.chunk = chunk.hash))")


IS_LIVE = "EXISTS (SELECT 1 FROM entry l WHERE l.node = entry.node AND l.until IS NULL)"
PURGED = (" AND EXISTS (SELECT 1 FROM entry g WHERE g.node = :node AND g.fate = 'purged') "
          "AND NOT EXISTS (SELECT 1 FROM entry l WHERE l.node = :node AND l.until IS NULL)")
PURGE = (  # what goes with a node: each if PURGED, and the entries last
    "DELETE FROM property WHERE node = :node", "DELETE FROM pin WHERE node = :node", "DELETE FROM lock WHERE node = :node",
    "DELETE FROM collection WHERE node = :node", "DELETE FROM name_row WHERE node = :node",
    "UPDATE account SET fed = :until WHERE id = :home AND fed < :until",
    "DELETE FROM entry WHERE node = :node AND until IS NOT NULL")


class Upkeep:
    """Keeps a cloud in order while it is used: history thins out, space comes back, bytes are checked.

    Only the holder of the lease works; every batch guards that it still is the holder.  All times are due times, so
    a wrong clock makes nothing early.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.cloud, self.db, self.clock = cloud, cloud.db, cloud.clock
        self.owner, self.fence = secrets.token_hex(8), 0

    def hold(self) -> bool:
        """Take or renew the lease; False while another process has it."""
        self.fence = self.db.lease("upkeep", self.owner, LEASE) or 0
        return self.fence > 0

    def release(self) -> None:
        """Let the next one work at once."""
        if self.fence:
            self.db.release("upkeep", self.owner)

    def _write(self, *body: Statement) -> None:
        guard = Statement("SELECT 'lease' WHERE (SELECT fence FROM lease WHERE name = 'upkeep') IS NOT ?", (self.fence,))
        self.db.write_once(Batch(list(body), [guard], frees=True), CloudError("busy", "another process took over the upkeep"))

    # ---- what runs out

    def expire(self) -> None:
        """Locks, sessions, waits, uploads, operation ids, and removed accounts."""
        now, keep = self.clock.due(), self.cloud.policy().keep_days * DAY
        self._write(Statement("DELETE FROM lock WHERE due <= ?", (now,)),
                    Statement("DELETE FROM device WHERE idle < ? OR due < ?", (now, now)),
                    Statement("DELETE FROM throttle WHERE due < ?", (now - HOUR,)),
                    Statement("DELETE FROM loose WHERE due < ?", (now,)),
                    Statement("DELETE FROM brake WHERE held IS NULL AND due < ? AND free < ? OR device NOT IN "
                              "(SELECT id FROM device)", (now, now)),
                    Statement("DELETE FROM pairing WHERE due < ?", (now,)),
                    Statement("DELETE FROM known_place WHERE due < ?", (now,)),
                    Statement("INSERT INTO entry (home, since, node, until, name, key, kind, size, mtime, rev, fate) SELECT home, s, node, s, '', "
                              "'', 1, 0, 0, s, 'purged' FROM growing, (SELECT max(seq) AS s FROM journal) WHERE due < ?", (now,)),
                    Statement("DELETE FROM growing WHERE due < ?", (now,)),
                    Statement("DELETE FROM kept WHERE due < ?", (now,)),
                    Statement("DELETE FROM op WHERE at < ?", (now - 7 * DAY,)),
                    Statement("DELETE FROM upload_chunk WHERE upload IN (SELECT id FROM upload WHERE due < ?)", (now,)),
                    Statement("DELETE FROM upload WHERE due < ?", (now,)),
                    Statement("UPDATE entry SET until = (SELECT max(seq) FROM journal), fate = 'purged' WHERE until IS NULL "
                              "AND node IN (SELECT root FROM account WHERE removed < ?)", (now - keep,)))        # nobody's now

    def look_after_crash(self) -> None:
        """After a stop that was none: is the database whole? (R22)"""
        if self.db.setting("unclean"):
            wrong = [row[0] for row in self.db.read("PRAGMA quick_check") if row != ("ok",)]
            if wrong:
                log.error("the database is damaged: %s; stop the server and restore a backup", wrong[0])
                self.db.broken = "the database is damaged"
            else:
                self._write(Statement("DELETE FROM setting WHERE name = 'unclean'"))

    def mark_age(self) -> None:
        """Note how far the journal is, to know later how old a seq is."""
        self._write(Statement("INSERT OR REPLACE INTO age SELECT ?, max(seq) FROM journal", (self.clock.due(),)))

    def seq_before(self, age: int) -> int:
        """The newest seq that is at least `age` ms old; 0 if none is known to be."""
        return self.db.read("SELECT coalesce(max(seq), 0) FROM age WHERE due <= ?", (self.clock.due() - age,))[0][0]

    # ---- history

    def thin(self) -> int:
        """Past --keep-days: trash goes, versions thin out along the ladder, pinned ones stay; returns rows gone."""
        cut = self.seq_before(self.cloud.policy().keep_days * DAY)
        if not cut:
            return 0
        self._write(Statement("INSERT OR REPLACE INTO setting VALUES ('oldest', ?)", (str(cut),)))
        gone = 0
        for (home,) in self.db.read("SELECT id FROM account"):
            self._write(Statement("UPDATE entry SET fate = 'purged' WHERE home = ? AND fate = 'deleted' AND until <= ? AND "
                                  + IS_LAST, (home, cut)), raise_shape(home))
            rows = []
            for row in self._thinned(home, cut):
                rows.append(row)
                if len(rows) == PIECE:
                    gone += self._forget(rows)
            gone += self._forget(rows)
        return gone + self._cap_history()

    def _thinned(self, home: int, cut: int) -> Iterator[tuple[int, int, int]]:
        """Ended entries that the ladder gives up."""
        ages = self.db.read("SELECT due, seq FROM age ORDER BY seq")
        seqs = [seq for _, seq in ages]
        last = None
        for since, node, until, fate, pinned in self.db.each(
                "SELECT e.since, e.node, e.until, e.fate, p.name IS NOT NULL FROM entry e "
                "LEFT JOIN pin p ON p.node = e.node AND p.rev = e.rev "
                "WHERE e.home = ? AND e.until <= ? AND e.fate <> 'purged' ORDER BY e.node, e.since DESC", (home, cut)):
            ended = ages[bisect.bisect_left(seqs, until)][0]             # at the latest
            span = next((span for most, span in LADDER if self.clock.due() - ended <= most), None)
            place = node, span and ended // span
            if fate == "replaced" and (pinned or span and place != last):
                last = place
            else:
                yield home, since, node

    def _forget(self, rows: list[tuple[int, int, int]]) -> int:
        """Remove ended entries; a feed that begins before they ended would have a gap (R37)."""
        count = len(rows)
        if rows:
            self._write(Statement("UPDATE account SET fed = (SELECT until FROM entry WHERE home = ?1 AND since = ?2 AND node = ?3) "
                                  "WHERE id = ?1 AND fed < (SELECT until FROM entry WHERE home = ?1 AND since = ?2 AND node = ?3)",
                                  list(rows), many=True),
                        Statement("DELETE FROM entry WHERE home = ? AND since = ? AND node = ? AND until IS NOT NULL",
                                  list(rows), many=True),
                        *map(raise_shape, {home for home, _, _ in rows}))
            rows.clear()
        return count

    def _cap_history(self) -> int:
        """Where history has a limit: the oldest goes first until it fits."""
        most, gone = self.cloud.policy().history, 0
        if most is None:
            return 0
        for home, live in self.db.read("SELECT a.id, c.size FROM account a JOIN collection c ON c.node = a.root"):
            over = self.db.read("SELECT coalesce(sum(size), 0) FROM entry WHERE home = ? AND kind = 0", (home,))[0][0] - live - most
            rows, dead = [], []
            for since, node, size, fate in self.db.read(
                    "SELECT e.since, e.node, CASE WHEN e.kind THEN c.size ELSE e.size END, e.fate FROM entry e "
                    "LEFT JOIN collection c ON c.node = e.node LEFT JOIN pin p ON p.node = e.node AND p.rev = e.rev "
                    "WHERE e.home = ? AND e.until IS NOT NULL AND e.fate <> 'purged' AND p.name IS NULL ORDER BY e.until", (home,)):
                if over <= 0:
                    break
                (dead if fate == "deleted" else rows).append((home, since, node))
                over -= size
            gone += len(dead) + self._forget(rows)
            if dead:
                self._write(*give_up(dead), raise_shape(home))
        return gone

    def purge(self) -> int:
        """Remove the rows of what was given up for good; returns nodes gone.

        Every statement asks again whether the node is live: then nothing of it goes, and it is not given up any more.
        """
        self.cloud.give_up_below(self.db.read("SELECT node, max(until) FROM entry WHERE fate = 'purged' AND kind = 1 GROUP BY node"))
        gone = 0
        while True:
            nodes = [{"node": node, "home": home, "until": until} for node, home, until in self.db.read(
                "SELECT node, home, max(until) FROM entry WHERE fate = 'purged' GROUP BY node, home LIMIT ?", (PIECE,))]
            if not nodes:
                return gone
            self._write(Statement("UPDATE entry SET fate = 'deleted' WHERE node = :node AND fate = 'purged' AND " + IS_LIVE, nodes, many=True),
                        *(Statement(sql + PURGED, nodes, many=True) for sql in PURGE),
                        *map(raise_shape, {row["home"] for row in nodes}))
            gone += len(nodes)

    # ---- space

    def sweep(self, shards: Iterable[int] = range(256), *, at_once: bool = False) -> dict[str, int]:
        """Give back the space of chunks nobody refers to (invariants of Blobs): condemn, bury, delete.

        at_once   without the days between: who is reading what is gone for good is cut off, and who relies on a chunk is
                  told by a guard that it is gone; objects that no row knows yet keep theirs
        """
        now, done = self.clock.due(), dict.fromkeys(("manifests", "condemned", "buried", "deleted"), 0)
        if self.db.broken or int(self.db.setting("hold") or 0) > now:
            return done                          # a backup copies what we might delete
        for shard in shards:
            prefix = "%02x" % shard
            done["manifests"] += self._sweep_manifests(prefix)
            done["condemned"] += self._condemn(prefix, now, now + 1 if at_once else now - DAY)
            self._find_orphans(prefix, now)
        done["buried"] = self._bury(now, now + 1 if at_once else now - KEEP_CONDEMNED, 0 if at_once else KEEP_BURIED)
        done["deleted"] = self._delete(now + at_once)
        return done

    def _sweep_manifests(self, prefix: str) -> int:
        rows = self.db.read("SELECT id FROM manifest WHERE id >= ? AND id < ? AND NOT EXISTS (SELECT 1 FROM entry "
                            "WHERE manifest = manifest.id)", ("m" + prefix, "m" + prefix + "g"))
        for piece in pieces(rows):
            self._write(Statement("DELETE FROM manifest WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entry "
                                  "WHERE entry.manifest = manifest.id)", piece, many=True),
                        Statement("DELETE FROM manifest_chunk WHERE manifest = ?1 AND NOT EXISTS (SELECT 1 FROM manifest "
                                  "WHERE id = ?1)", piece, many=True),
                        Statement("DELETE FROM digest WHERE manifest = ?1 AND NOT EXISTS (SELECT 1 FROM manifest "
                                  "WHERE id = ?1)", piece, many=True))
        return len(rows)

    def _condemn(self, prefix: str, now: int, before: int) -> int:
        """Note that nobody refers to chunks, nor sent them ahead, that came before a due time."""
        unwanted = "NOT " + REFERRED + " AND NOT EXISTS (SELECT 1 FROM loose WHERE chunk = chunk.hash AND due > ?)"
        rows = self.db.read("SELECT hash FROM chunk WHERE hash >= ? AND hash < ? AND condemned IS NULL AND at < ? AND " + unwanted,
                            (prefix, prefix + "g", before, now))
        for piece in pieces(rows):
            self._write(Statement("UPDATE chunk SET condemned = ? WHERE hash = ? AND " + unwanted,
                                  [(now, hash, now) for (hash,) in piece], many=True))
        return len(rows)

    def _bury(self, now: int, before: int, rest: int) -> int:
        """Rows of chunks that were condemned before a due time go, their objects after a rest; one referred to again is acquitted."""
        rows = self.db.read("SELECT hash FROM chunk WHERE condemned < ?", (before,))
        for piece in pieces(rows):
            self._write(
                Statement("UPDATE chunk SET condemned = NULL WHERE hash = ? AND " + REFERRED, piece, many=True),
                Statement("INSERT OR IGNORE INTO grave SELECT object, ? FROM chunk WHERE hash = ? AND condemned IS NOT NULL "
                          "AND object IS NOT NULL", [(now + rest, hash) for (hash,) in piece], many=True),
                Statement("DELETE FROM digest WHERE manifest = ? AND EXISTS (SELECT 1 FROM chunk WHERE hash = manifest "
                          "AND condemned IS NOT NULL)", piece, many=True),
                Statement("DELETE FROM chunk WHERE hash = ? AND condemned IS NOT NULL", piece, many=True))
        return len(rows)

    def _find_orphans(self, prefix: str, now: int) -> None:
        """Objects without a row: uploads that broke off, or losers of a race.  They may yet get one."""
        found = []
        for name, _, _ in self.cloud.blobs.store.list(prefix):
            if not self._is_object(name) and not self.db.read("SELECT 1 FROM grave WHERE object = ?", (name,)):
                found.append((name, now + KEEP_ORPHANS))
        for piece in pieces(found):
            self._write(Statement("INSERT OR IGNORE INTO grave VALUES (?, ?)", piece, many=True))

    def _is_object(self, name: str) -> bool:
        return bool(self.db.read("SELECT 1 FROM chunk WHERE hash = ? AND object = ?", (name.lstrip(".")[:64], name)))

    def _delete(self, now: int) -> int:
        rows, left = self.db.read("SELECT object FROM grave WHERE due < ?", (now,)), 0
        for piece in pieces(rows):
            kept = [(now + HOUR, name) for (name,) in piece if not self._is_object(name) and not self._unlink(name)]
            self._write(Statement("UPDATE grave SET due = ? WHERE object = ?", kept, many=True),
                        Statement("DELETE FROM grave WHERE object = ? AND due < ?", [(name, now) for (name,) in piece], many=True))
            left += len(kept)
        return len(rows) - left

    def _unlink(self, name: str) -> bool:
        """Delete an object; False if it cannot be now: somebody reads it, on Windows.  Another time, then."""
        try:
            self.cloud.blobs.store.delete(name)
        except OSError as error:
            log.warning("object %s is left for later: %s", name, error.strerror)
            return False
        return True

    # ---- what can be done later than the write

    def index_names(self) -> None:
        """Bring the index of names up to date, where SQLite has one."""
        if not self.db.has_index():
            return
        done = int(self.db.setting("indexed") or 0)
        reached = self._stretch(done, 20_000)
        if reached == done:
            return
        (last,), = self.db.read("SELECT coalesce(max(id), 0) FROM name_row")
        rows = [row for (home,) in self.db.read("SELECT id FROM account") for row in self.db.read(
            "SELECT node, key FROM entry e WHERE home = ? AND since > ? AND since <= ? AND NOT EXISTS (SELECT 1 FROM entry p "
            "WHERE p.node = e.node AND p.until = e.since AND p.key = e.key) ORDER BY since", (home, done, reached))]
        chosen = [(last + n, node, key) for n, (node, key) in enumerate(rows, 1)]
        self._write(Statement("INSERT INTO name_row VALUES (?, ?)", [row[:2] for row in chosen], many=True),
                    Statement("INSERT INTO name_index (rowid, name) VALUES (?, ?)", [(id, key) for id, _, key in chosen], many=True),
                    Statement("INSERT OR REPLACE INTO setting VALUES ('indexed', ?)", (str(reached),)))

    def index_contents(self) -> None:
        """Bring the index of contents up to date, where SQLite has one; a commit takes about a MiB, so that nobody waits long."""
        if not self.db.has_index():
            return
        done = int(self.db.setting("read") or 0)
        reached = self._stretch(done, 2_000)
        rows, size = [], 0
        for home, manifest, length in self._unread(done, reached):
            rows.append((home, manifest, self._text_of(manifest, length)))
            size += length
            if size > MiB:
                self._add_contents(rows)
                rows, size = [], 0
        self._add_contents(rows)
        if reached != done:
            self._write(Statement("INSERT OR REPLACE INTO setting VALUES ('read', ?)", (str(reached),)))

    def _text_of(self, manifest: str, size: int) -> str:
        """What of a file goes into the index; nothing if it is no text, or cannot be read: the scrub tells of that."""
        try:
            return spread(decode_text(self.cloud.content_of(manifest, size).read(TEXT_LIMIT)) or "")
        except CloudError as error:
            log.warning("not indexed: %s", error)
            return ""

    def _unread(self, done: int, reached: int) -> Iterator[tuple[int, str, int]]:
        """(home, manifest, bytes) of live text files that are not indexed yet."""
        seen = set()
        for (home,) in self.db.read("SELECT id FROM account"):
            for manifest, size, media in self.db.read(
                    "SELECT manifest, size, media FROM entry e WHERE home = ? AND since > ? AND since <= ? AND until IS NULL "
                    "AND kind = 0 AND size BETWEEN 1 AND ? AND NOT EXISTS (SELECT 1 FROM text_row r WHERE r.home = e.home "
                    "AND r.manifest = e.manifest)", (home, done, reached, TEXT_LIMIT)):
                if kind_of_media(media) in ("text", "table") and (home, manifest) not in seen:
                    seen.add((home, manifest))
                    yield home, manifest, size

    def _add_contents(self, rows: list[tuple[int, str, str]]) -> None:
        (last,), = self.db.read("SELECT coalesce(max(id), 0) FROM text_row")
        rows = [(last + n, *row) for n, row in enumerate(rows, 1)]
        if rows:
            self._write(Statement("INSERT INTO text_row VALUES (?, ?, ?)", [row[:3] for row in rows], many=True),
                        Statement("INSERT INTO text_index (rowid, home, body) VALUES (?, ?, ?)",
                                  [(id, home, text) for id, home, _, text in rows], many=True))

    def tidy(self) -> None:
        """Drop thumbnails of what is gone; begin the index of contents anew when most of it is about what is gone."""
        gone = self.db.read("SELECT id FROM thumbnail t WHERE NOT EXISTS (SELECT 1 FROM entry WHERE manifest = t.manifest "
                            "AND home = t.home)")
        for piece in pieces(gone):
            self._write(Statement("DELETE FROM thumbnail WHERE id = ?", piece, many=True))
        stale, known = self.db.read("SELECT coalesce(sum(NOT EXISTS (SELECT 1 FROM entry e WHERE e.manifest = r.manifest "
                                    "AND e.home = r.home AND until IS NULL)), 0), count(*) FROM text_row r")[0]
        if stale > 1000 and 2 * stale > known:
            self._write(Statement("INSERT INTO text_index (text_index) VALUES ('delete-all')"), Statement("DELETE FROM text_row"),
                        Statement("DELETE FROM setting WHERE name = 'read'"))

    def _stretch(self, done: int, most: int) -> int:
        """The seq up to which some work goes that stands at `done`: about `most` entries of a home, and no batch in part."""
        reached = self.cloud.head()
        for (home,) in self.db.read("SELECT id FROM account"):
            for (since,) in self.db.read("SELECT since FROM entry WHERE home = ? AND since > ? AND since <= ? ORDER BY since "
                                         "LIMIT 1 OFFSET ?", (home, done, reached, most)):
                reached = since
        return reached

    def digest(self, limit: int = GiB) -> None:
        """Compute the SHA-256 of files that came in parts, some at a time."""
        for manifest, size in self.db.read("SELECT id, size FROM manifest WHERE sha256 IS NULL LIMIT 100"):
            whole = hashlib.sha256()
            for part in self.cloud.content_of(manifest, size).slices():
                for piece in (part,) if isinstance(part, bytes) else read_pieces(part):
                    whole.update(piece)
            self._write(Statement("UPDATE manifest SET sha256 = ? WHERE id = ?", (whole.hexdigest(), manifest)))
            limit -= size
            if limit < 0:
                break

    def scrub(self) -> None:
        """Read one of 4096 parts of all chunks; each has its turn in 30 days (R25)."""
        turn = int(self.db.setting("scrubbed") or 0) % 4096
        for hash, _, wrong in check_chunks(self.cloud, "%03x" % turn):
            if wrong:
                log.error("chunk %s is %s; the command verify names the files", hash, wrong)
        self._write(Statement("INSERT OR REPLACE INTO setting VALUES ('scrubbed', ?)", (str(turn + 1),)))


def check_chunks(cloud: Cloud, prefix: str = "", quick: bool = False) -> Iterator[tuple[str, int, str | None]]:
    """Check the chunks whose hashes begin so: (hash, size, what is wrong or None); damage is noted in the rows.

    quick   only that the bytes are there
    """
    for hash, size, object, bad, data in cloud.db.each(
            "SELECT hash, size, object, bad, data FROM chunk WHERE hash >= ? AND hash < ?", (prefix, prefix + "g")):
        wrong = None
        try:
            if object is None:
                wrong = None if hashlib.sha256(data).hexdigest() == hash else "damaged"
            else:
                with cloud.blobs.store.get(object) as file:
                    if os.fstat(file.fileno()).st_size != size or not quick and hash_file(file) != hash:
                        wrong = "damaged"
        except FileNotFoundError:
            wrong = "missing"
        except OSError as error:
            wrong = str(error)
        if bool(wrong) != bool(bad) and (wrong or not quick) and not cloud.db.readonly:
            cloud.db.run(Statement("UPDATE chunk SET bad = ? WHERE hash = ?", (cloud.clock.wall() if wrong else None, hash)))
        yield hash, size, wrong


class Janitor(threading.Thread):
    """Does what is due, beside requests; what only one process may do, under the lease of Upkeep."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(name="janitor", daemon=True)
        self.cloud, self.upkeep, self.ended = cloud, Upkeep(cloud), threading.Event()
        self.next = {job: cloud.clock.due() + min(every, MINUTE) for job, (every, _) in JOBS.items()}
        self.shard = secrets.randbelow(256)
        self.failing: dict[str, str] = {}                    # job: what was said of it last

    def run(self) -> None:
        while not self.ended.wait(1):
            now = self.cloud.clock.due()
            for job, (every, run) in JOBS.items():
                if now >= self.next[job] and not self.ended.is_set():
                    self.next[job] = now + every
                    self._do(job, run)

    def _do(self, job: str, run: Callable[[Janitor], Any]) -> None:
        try:
            if job in EVERYBODYS or self.upkeep.hold():
                run(self)
            self.failing.pop(job, None)
        except CloudError as error:
            if self.failing.get(job) != str(error):              # once, not every five seconds (R19)
                log.warning("%s: %s", job, error)
            self.failing[job] = str(error)
        except Exception:
            log.exception(job)

    def sweep_some(self) -> None:
        """One shard in turn: all have theirs within a day."""
        self.shard = (self.shard + 1) % 256
        self.upkeep.sweep([self.shard])

    def stop(self) -> None:
        self.ended.set()
        self.join(1)                             # a job may be ended at any moment
        with suppress(CloudError):
            self.upkeep.release()


EVERYBODYS = ("devices",)        # what each process has to write
JOBS: dict[str, tuple[int, Callable[[Janitor], Any]]] = {      # name: (every so many ms, what)
    "devices": (MINUTE, lambda janitor: janitor.cloud.accounts.save_used()),
    "clock": (MINUTE, lambda janitor: janitor.cloud.db.save_clock()),
    "reserve": (MINUTE, lambda janitor: janitor.cloud.keep_reserve()),
    "crash": (MINUTE, lambda janitor: janitor.upkeep.look_after_crash()),
    "expire": (MINUTE, lambda janitor: janitor.upkeep.expire()),
    "names": (5 * SECOND, lambda janitor: janitor.upkeep.index_names()),
    "contents": (5 * SECOND, lambda janitor: janitor.upkeep.index_contents()),
    "tidy": (DAY, lambda janitor: janitor.upkeep.tidy()),
    "digest": (MINUTE, lambda janitor: janitor.upkeep.digest()),
    "age": (HOUR, lambda janitor: janitor.upkeep.mark_age()),
    "purge": (5 * MINUTE, lambda janitor: janitor.upkeep.purge()),
    "sweep": (5 * MINUTE, Janitor.sweep_some),
    "scrub": (10 * MINUTE, lambda janitor: janitor.upkeep.scrub()),
    "thin": (DAY, lambda janitor: janitor.upkeep.thin()),
}


# ---- verify

class Progress:
    """How far a long command is, on a terminal: count, bytes, rate, time left."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.count, self.done = what, total, 0, 0
        self.began = self.shown = time.monotonic()
        self.on = sys.stderr.isatty()

    def add(self, size: int) -> None:
        self.count, self.done = self.count + 1, self.done + size
        if self.on and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            rate = self.done / max(0.001, self.shown - self.began)
            left = (self.total - self.done) / rate if rate else 0
            sys.stderr.write("\r" + ("%s: %d, %s of %s, %s/s, %d:%02d left" % (
                self.what, self.count, format_size(self.done), format_size(self.total), format_size(rate), left // 60, left % 60)).ljust(78))
            sys.stderr.flush()

    def end(self) -> None:
        if self.on:
            sys.stderr.write("\r%78s\r" % "")


def verify(cloud: Cloud, quick: bool = False) -> list[str]:
    """Check everything there is; returns a line for each thing that is wrong.  It changes nothing but notes of damage."""
    wrong = ["database: %s" % row for row in cloud.db.read("PRAGMA %s_check" % ("quick" if quick else "integrity"))
             if row != ("ok",)]
    wrong += ["sums of collection %d are wrong" % node for node, *_ in cloud.db.read(WRONG_SUMS)]
    wrong += ["the bytes of %s are not known" % name for name in names_of(
        cloud, "NOT EXISTS (SELECT 1 FROM chunk WHERE hash = e.manifest) AND NOT EXISTS (SELECT 1 FROM manifest WHERE id = e.manifest)", ())]
    wrong += ["the parts of %s do not make its size" % row for row in cloud.db.read(WRONG_MANIFESTS)]
    (total,), = cloud.db.read("SELECT coalesce(sum(size), 0) FROM chunk")
    progress, bad = Progress("verify", total), []
    for hash, size, what in check_chunks(cloud, quick=quick):
        progress.add(size)
        if what:
            bad.append((hash, what))
    progress.end()
    return wrong + name_damage(cloud, dict(bad))


def name_damage(cloud: Cloud, bad: dict[str, str]) -> list[str]:
    """A line for each file, and each of its versions, that chunks {hash: what is wrong} belong to."""
    return ["%s: a part is %s" % (name, what) for hash, what in bad.items()
            for name in list(names_of(cloud, "e.manifest = ? OR e.manifest IN (SELECT manifest FROM manifest_chunk WHERE chunk = ?)",
                                      (hash, hash))) or ["chunk " + hash + ", which nothing refers to"]]


WRONG_SUMS = """SELECT c.node FROM collection c WHERE (c.size, c.files) <> (
    SELECT coalesce(sum(CASE WHEN e.kind THEN k.size ELSE e.size END), 0), coalesce(sum(CASE WHEN e.kind THEN k.files ELSE 1 END), 0)
    FROM entry e LEFT JOIN collection k ON k.node = e.node WHERE e.parent = c.node AND e.until IS NULL)"""
WRONG_MANIFESTS = """SELECT m.id FROM manifest m WHERE m.size <> (SELECT coalesce(sum(h.size), -1) FROM manifest_chunk c
    JOIN chunk h ON h.hash = c.chunk WHERE c.manifest = m.id)"""


def names_of(cloud: Cloud, where: str, params: tuple[Any, ...]) -> Iterator[str]:
    """Files whose present or past content a condition on entry e picks: "ann: photos/a.jpg, version of 2026-..."."""
    for node, home, account, since, until, at in cloud.db.read(
            "SELECT e.node, e.home, a.name, e.since, e.until, j.at FROM entry e JOIN account a ON a.id = e.home "
            "LEFT JOIN journal j ON j.seq = e.rev WHERE e.kind = 0 AND (" + where + ")", params):
        with cloud.db.snapshot() as read:
            (root,), = read("SELECT root FROM account WHERE id = ?", (home,))
            path = _Past(read, root, until - 1 if until else cloud.head()).path(node)
        yield "%s: %s%s" % (account, "/".join(path or ("(deleted)",)), ", version of " + format_time(at or 0) if until else "")


# ---- backup, restore, repair, export, import

class Copying:
    """Objects on their way into a store.  One that is missing, damaged or cannot be read costs only itself, and is noted."""

    def __init__(self, target: ObjectDirectory) -> None:
        self.target, self.count, self.size = target, 0, 0
        self.bad: dict[str, str] = {}                        # {hash: what is wrong with it}

    def run(self, source: ObjectDirectory, rows: Iterable[tuple[str, int, str]]) -> None:
        """Copy what the target lacks of (hash, bytes, name).  raises OSError when the target cannot be written"""
        rows = [row for row in rows if not self.target.has(row[2])]
        progress = Progress("copy", sum(size for _, size, _ in rows))
        for hash, size, name in rows:
            data, wrong = read_object(source, name, hash)
            if wrong:
                self.bad[hash] = wrong
            else:
                self.target.put(name, data)
                self.bad.pop(hash, None)
                self.count, self.size = self.count + 1, self.size + size
            progress.add(size)
        progress.end()


def read_object(store: ObjectDirectory, name: str, hash: str) -> tuple[bytes, str | None]:
    """(the bytes of an object, what is wrong with it or None)"""
    try:
        with store.get(name) as file:
            data = file.read()
    except FileNotFoundError:
        return b"", "missing"
    except OSError as error:
        return b"", error.strerror or str(error)
    return data, None if hashlib.sha256(data).hexdigest() == hash else "damaged"


def check_apart(data: Path, to: Path) -> None:
    """raises CloudError if one of two directories is, or lies in, the other"""
    if lies_in(to, data) or lies_in(data, to):
        raise CloudError("conflict", "%s is, holds or lies in the data directory %s; give another place" % (to, data))


def check_outside(data: Path, place: Path) -> None:
    """raises CloudError if plain files would be written into, or read from, a data directory"""
    if lies_in(place, data):
        raise CloudError("conflict", "%s is or lies in the data directory %s; give another place" % (place, data))


def lies_in(inner: Path, outer: Path) -> bool:
    """Is it the other one, or below it?  By what is there, not by how it is spelt: links, mounts and case are seen through."""
    inner = inner.resolve()
    return outer.exists() and any(place.exists() and os.path.samefile(place, outer) for place in (inner, *inner.parents))


def back_up(cloud: Cloud, to: Path) -> tuple[int, int, list[str]]:
    """Bring a directory to the state of a cloud, which may be in use; returns (objects copied, bytes, what could not be).

    Only what the directory lacks is copied.  It becomes the new state all at once, when its database commits; what only
    the state before needed is removed after that.
    raises  CloudError conflict for the backup of another cloud: what it holds would be removed
    """
    check_apart(cloud.config.data, to)
    claim_directory(to)
    lock = FileLock(to / "write.lock")
    if not lock.acquire(wait=False):
        raise CloudError("conflict", "%s is in use: another backup is being written there, or a server runs on it" % to)
    db = sqlite3.connect(to / "cloud.db", isolation_level=None, uri=True)
    try:
        db.execute("ATTACH ? AS live", (cloud.db.address(),))
        db.execute("PRAGMA main.synchronous = EXTRA")        # the journal's name is gone from the disk, too, before it is done
        prepare_backup(db, to)
        with sweep_held(cloud):
            copying = Copying(ObjectDirectory(to / "objects"))
            copying.target.create()
            copying.run(cloud.blobs.store, cloud.db.each(OBJECTS))           # most of it, holding nothing
            db.execute("BEGIN IMMEDIATE")
            bad = {**copy_tables(db), **copying.bad}
            copying.run(cloud.blobs.store, db.execute(OBJECTS))              # and what came meanwhile
            db.execute("COMMIT")
            sync_directory(to)
            if db.execute("PRAGMA main.quick_check").fetchone() != ("ok",):
                raise CloudError("storage-failed", "the copy of the database is damaged; back up to another place")
            prune_objects(copying.target, db)
    except sqlite3.Error as error:
        raise database_error(error, to / "cloud.db") from error
    finally:
        db.close()
        lock.close()
    return copying.count, copying.size, name_damage(cloud, {**bad, **copying.bad})


@contextmanager
def sweep_held(cloud: Cloud) -> Iterator[None]:
    """Nothing is swept meanwhile; what is deleted stays until we are done."""
    if cloud.db.readonly:
        yield                                    # nobody can sweep there
        return
    cloud.db.run(Statement("INSERT OR REPLACE INTO setting VALUES ('hold', ?)", (str(cloud.clock.due() + 7 * DAY),)))
    try:
        yield
    finally:
        cloud.db.run(Statement("DELETE FROM setting WHERE name = 'hold'"), frees=True)


OBJECTS = "SELECT hash, size, object FROM chunk WHERE object IS NOT NULL"


def prepare_backup(db: sqlite3.Connection, to: Path) -> None:
    """Bring the tables of a backup that an older version wrote to those of today, and see whose it is."""
    (version,) = db.execute("PRAGMA main.user_version").fetchone()
    check_version(version)
    if not db.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'setting'").fetchone():
        return                                   # a new one, or one that was never finished
    if identity_of(db, "main") not in (None, identity_of(db, "live")):
        raise CloudError("conflict", "%s holds a backup of another cloud; give a directory of its own" % to)
    if 0 < version <= len(MIGRATIONS):
        migrate(db, steps_from(db, version))


def identity_of(db: sqlite3.Connection, schema: str) -> Any:
    """What tells clouds apart and survives every restore: the root of the first account; None without accounts."""
    row = db.execute("SELECT root FROM %s.account ORDER BY id LIMIT 1" % schema).fetchone()
    return row and row[0]


def copy_tables(db: sqlite3.Connection) -> dict[str, str]:
    """Bring the tables of `main` to those of `live`; chunks and thumbnails that are there are not copied again.

    returns  {hash: "damaged"} of chunks in rows that are
    """
    there = {name for (name,) in db.execute("SELECT name FROM main.sqlite_master")}
    for kind, name, sql in db.execute("SELECT type, name, sql FROM live.sqlite_master WHERE sql IS NOT NULL "
                                      "AND name NOT LIKE '%_index%' ORDER BY type DESC").fetchall():
        if name not in there:
            db.execute(sql)
        if kind == "table" and name not in ("chunk", "thumbnail", "name_row", "text_row", "lease"):
            db.execute('DELETE FROM main."%s"' % name)
            db.execute(copy_rows(db, name))
    db.execute("PRAGMA main.user_version = %d" % (1 + len(MIGRATIONS)))
    db.execute("DELETE FROM main.chunk WHERE NOT EXISTS (SELECT 1 FROM live.chunk l WHERE l.hash = chunk.hash)")
    new = "NOT EXISTS (SELECT 1 FROM main.chunk c WHERE c.hash = l.hash)"
    bad = {hash: "damaged" for hash, data in db.execute("SELECT hash, data FROM live.chunk l WHERE data IS NOT NULL AND " + new)
           if hashlib.sha256(data).hexdigest() != hash}
    db.execute(copy_rows(db, "chunk") + " l WHERE " + new)
    db.execute("UPDATE main.chunk SET (object, at, condemned, bad) = (SELECT object, at, condemned, bad FROM live.chunk l "
               "WHERE l.hash = chunk.hash) WHERE (object, at, condemned, bad) IS NOT (SELECT object, at, condemned, bad "
               "FROM live.chunk l WHERE l.hash = chunk.hash)")
    db.execute("DELETE FROM main.thumbnail WHERE NOT EXISTS (SELECT 1 FROM live.thumbnail l WHERE l.id = thumbnail.id "
               "AND l.home = thumbnail.home AND l.manifest = thumbnail.manifest)")
    db.execute(copy_rows(db, "thumbnail") + " l WHERE NOT EXISTS (SELECT 1 FROM main.thumbnail t WHERE t.id = l.id)")
    db.execute("DELETE FROM main.setting WHERE name IN ('hold', 'indexed', 'read', 'running', 'unclean')")
    return bad


def copy_rows(db: sqlite3.Connection, table: str) -> str:
    """The statement that copies a table from `live` to `main`, column by column, in whatever order each has them."""
    columns = ", ".join('"%s"' % row[1] for row in db.execute('PRAGMA live.table_info("%s")' % table))
    return 'INSERT INTO main."%s" (%s) SELECT %s FROM live."%s"' % (table, columns, columns, table)


def prune_objects(store: ObjectDirectory, db: sqlite3.Connection) -> None:
    """Remove objects that no row of a backup names."""
    for shard in range(256):
        for name, _, _ in list(store.list("%02x" % shard)):
            if not db.execute("SELECT 1 FROM chunk WHERE hash = ? AND object = ?", (name[:64], name)).fetchone():
                store.delete(name)


def restore_backup(source: Path, config: Config) -> list[str]:
    """Make a new data directory from a backup, and check it; returns what is wrong.

    What is damaged or missing in the backup costs only the files it belongs to.  The server gets a new epoch, by which
    clients know that what they miss is unknown, not deleted (R29).
    """
    if not (source / "cloud.db").exists():
        raise CloudError("not-found", "%s holds no backup" % source)
    if (config.data / "cloud.db").exists():
        raise CloudError("conflict", "%s holds a cloud already; restore into an empty directory" % config.data)
    check_apart(config.data, source)
    claim_directory(config.data)
    copying = Copying(ObjectDirectory(config.data / "objects"))
    copying.target.create()
    partial = config.data / "cloud.db.partial"
    partial.unlink(missing_ok=True)
    backup = sqlite3.connect((source / "cloud.db").resolve().as_uri() + "?mode=ro", uri=True)
    db = sqlite3.connect(partial, isolation_level=None)
    try:
        backup.backup(db)
        check_version(db.execute("PRAGMA user_version").fetchone()[0])
        copying.run(ObjectDirectory(source / "objects"), db.execute(OBJECTS))
    except sqlite3.Error as error:
        raise CloudError("storage-failed", "%s is no whole backup (%s)" % (source, error)) from error
    finally:
        backup.close()
        db.close()
    os.replace(partial, config.data / "cloud.db")
    sync_directory(config.data)
    with closing(Cloud(config, how="open")) as cloud:
        begin_anew(cloud)
        return verify(cloud)


class Healing(NamedTuple):
    """A chunk that is damaged or missing, and where its bytes are."""
    hash: str
    size: int
    wrong: str
    source: Callable[[], bytes] | None           # None: nowhere


def find_healing(cloud: Cloud, source: Path) -> list[Healing]:
    """Every chunk that is damaged or missing, and what of a directory has its bytes: a backup, a data directory, or plain
    files such as an export or a sync folder.  Nothing is changed; bytes are compared by their hash alone."""
    wanted = {hash: (size, wrong) for hash, size, wrong in check_chunks(cloud) if wrong}
    for hash, size in cloud.db.read(UNKNOWN_CHUNKS):
        wanted[hash] = size, "missing"
    look = look_in_backup if (source / "cloud.db").exists() else look_in_files
    found = look(cloud, source, {hash: size for hash, (size, _) in wanted.items()})
    return [Healing(hash, size, wrong, found.get(hash)) for hash, (size, wrong) in sorted(wanted.items())]


UNKNOWN_CHUNKS = (  # chunks that files name and no row knows, with their sizes
    "SELECT e.manifest, max(e.size) FROM entry e WHERE e.kind = 0 AND e.manifest < 'g' AND NOT EXISTS (SELECT 1 FROM chunk "
    "WHERE hash = e.manifest) GROUP BY e.manifest UNION SELECT m.chunk, coalesce((SELECT min(n.offset) FROM manifest_chunk n "
    "WHERE n.manifest = m.manifest AND n.offset > m.offset), f.size) - m.offset FROM manifest_chunk m JOIN manifest f "
    "ON f.id = m.manifest WHERE NOT EXISTS (SELECT 1 FROM chunk WHERE hash = m.chunk)")


def look_in_backup(cloud: Cloud, source: Path, wanted: dict[str, int]) -> dict[str, Callable[[], bytes]]:
    """Which of some chunks {hash: bytes} a backup or data directory has whole."""
    store, found = ObjectDirectory(source / "objects"), {}
    db = sqlite3.connect((source / "cloud.db").resolve().as_uri() + "?mode=ro", uri=True, check_same_thread=False)
    with closing(db):
        for hash in wanted:
            for name, data in db.execute("SELECT object, data FROM chunk WHERE hash = ?", (hash,)):
                if name and read_object(store, name, hash)[1] is None:
                    found[hash] = partial(lambda name, hash: read_object(store, name, hash)[0], name, hash)
                elif data is not None and hashlib.sha256(data).hexdigest() == hash:
                    found[hash] = partial(bytes, data)
    return found


def look_in_files(cloud: Cloud, source: Path, wanted: dict[str, int]) -> dict[str, Callable[[], bytes]]:
    """Which of some chunks plain files have at the offset where ours had them; any file of the right size may be it."""
    sizes: dict[int, list[Path]] = {}
    for above, _, names in os.walk(source):
        for name in names:
            with suppress(OSError):
                place = Path(above, name)
                sizes.setdefault(place.stat().st_size, []).append(place)
    found = {}
    for hash, length in wanted.items():
        for size, offset in cloud.db.read(
                "SELECT DISTINCT e.size, 0 FROM entry e WHERE e.manifest = :hash UNION SELECT DISTINCT f.size, m.offset FROM "
                "manifest_chunk m JOIN manifest f ON f.id = m.manifest WHERE m.chunk = :hash", {"hash": hash}):
            for place in sizes.get(size, ()):
                read = partial(read_range, place, offset, length)
                if hash not in found and hashlib.sha256(read()).hexdigest() == hash:
                    found[hash] = read
    return found


def read_range(place: Path, offset: int, count: int) -> bytes:
    """Some bytes of a file; what cannot be read is not there."""
    try:
        with open(place, "rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError:
        return b""


def heal(cloud: Cloud, healings: Iterable[Healing]) -> int:
    """Put the bytes that were found in the place of the damaged ones; returns how many chunks are whole again."""
    healed = 0
    for hash, size, _, source in healings:
        data = source() if source else b""
        if hashlib.sha256(data).hexdigest() == hash:
            inline = len(data) <= INLINE_LIMIT
            name = None if inline else cloud.blobs.put_chunk(hash, data, secrets.token_hex(8))
            cloud.db.run(
                Statement("INSERT INTO chunk (hash, size, at) VALUES (?, ?, ?) ON CONFLICT (hash) DO NOTHING", (hash, size, cloud.clock.due())),
                Statement("UPDATE chunk SET object = ?, data = ?, bad = NULL WHERE hash = ?", (name, data if inline else None, hash)))
            healed += 1
    return healed


SEQS_LOST = 1 << 20             # more writes than a state that was put back can have lost


def begin_anew(cloud: Cloud) -> None:
    """Say that the data may be an older state than clients have seen: a new epoch, which is what Nextcloud's clients read, too.

    The next seqs are left out: etags are made of them, and those of what was lost never come to mean something else.
    """
    cloud.db.run(Statement("UPDATE setting SET value = ? WHERE name = 'epoch'", (secrets.token_hex(8),)),
                 Statement("INSERT INTO journal (seq, at, home, account, device, action, detail, tag) "
                           "SELECT max(seq) + ?, ?, 0, 0, '', 'restored', '{}', ? FROM journal",
                           (SEQS_LOST, cloud.clock.wall(), secrets.token_hex(8))))
    log.warning("the data counts as restored: clients ask before they go on, and none deletes what is missing here")


def export_files(cloud: Cloud, who: Principal, to: Path, top: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Write an account's files as plain files with their times, below `top` in a directory; (files written, what could not be).

    When it returns all is on the medium.
    """
    check_outside(cloud.config.data, to)
    make_directory(to)
    progress, export = Progress("export", cloud.stat(who, ()).size), Export(to)
    if top:
        export.put(top)
    for path, node, content in cloud.walk_contents(who, (), missed=lambda path, error: export.miss(top + path, error)):
        export.put(top + path, node, content)
        progress.add(node.size)
    progress.end()
    export.sync()
    return export.written, export.failed


class Export:
    """Plain files on their way into a directory, whatever names its file system can hold and tell apart.

    A name that would fall onto another is found before anything is written, and left out with all that is in it.  What is
    there already with the same size, time and bytes is left, so a run that broke off goes on.
    """

    def __init__(self, to: Path) -> None:
        self.to, self.written = to, 0
        self.failed: list[str] = []              # what could not be written, and why
        self.lost: set[tuple[str, ...]] = set()
        self.touched: set[Path] = set()          # directories whose names are not durable yet
        self.names = lru_cache(maxsize=DEPTH_LIMIT)(lambda above: {key_of(name) for name in os.listdir(above)})

    def put(self, path: tuple[str, ...], node: Node | None = None, content: Content | None = None) -> None:
        """Make a collection, or with `content` a file; or note why not."""
        if any(path[:depth] in self.lost for depth in range(len(path))):
            return                               # it was said of what holds it
        try:
            place = self._place_of(path)
            if content is None:
                place.mkdir(exist_ok=True)
            elif not is_same_file(place, node, content):
                write_file(place, node, content)
                self.written += 1
            self.touched.add(place.parent)
        except (OSError, CloudError) as error:
            self.miss(path, error)

    def miss(self, path: tuple[str, ...], error: Exception) -> None:
        self.lost.add(path)
        self.failed.append("%s: %s" % ("/".join(path) or "(the top)", reason_of(error)))

    def _place_of(self, path: tuple[str, ...]) -> Path:
        """raises OSError, CloudError if nothing can, or may, be put there"""
        name, place = path[-1], self.to.joinpath(*path)
        check_name(name)                         # of an account, too
        if os.name == "nt" and not is_windows_name(name):
            raise OSError(errno.EINVAL, "Windows cannot hold this name")
        if os.path.lexists(place) and key_of(name) not in self.names(place.parent):
            raise OSError(errno.EEXIST, "this place cannot tell it from another name that is there")
        return place

    def sync(self) -> None:
        for directory in self.touched:
            sync_directory(directory)


def is_same_file(place: Path, node: Node, content: Content) -> bool:
    """Is a file there with this size, time and, whoever wrote it, these bytes?"""
    try:
        about = place.stat()
        if about.st_size != node.size or abs(about.st_mtime_ns // 1_000_000 - node.mtime) > 2000:
            return False
        with open(place, "rb") as file:
            return all(hashlib.sha256(file.read(size)).hexdigest() == hash for hash, size in content.parts())
    except OSError:
        return False


def write_file(place: Path, node: Node, content: Content) -> None:
    """Write a file beside its place and, when it is on the medium, put it there.  What a killed run left is written over."""
    partial = place.with_name(".cloudserver-%s.partial" % hashlib.sha256(place.name.encode("utf-8", "replace")).hexdigest()[:16])
    try:
        with open(partial, "wb") as file:
            for part in content.slices():
                for piece in (part,) if isinstance(part, bytes) else read_pieces(part):
                    file.write(piece)
            file.flush()
            sync_file(file.fileno())
        os.utime(partial, ns=(node.mtime * 1_000_000,) * 2)
        insist(os.replace, partial, place)
    finally:
        partial.unlink(missing_ok=True)


def import_files(cloud: Cloud, who: Principal, source: Path, into: tuple[str, ...]) -> tuple[int, list[str]]:
    """Store a directory of plain files, with their times; returns (files stored, what could not be).

    What is there already with the same size and time is left.  Links and devices are skipped, and named.
    """
    check_outside(cloud.config.data, source)
    total = sum(size for _, size in scan_files(source, []))
    progress, skipped, stored = Progress("import", total), [], [0]

    def store(place: Path, size: int) -> None:
        path = into + place.relative_to(source).parts
        try:
            at = place.stat().st_mtime_ns // 1_000_000
            node = cloud.find(who, check_path(path))
            if node is None or node.kind or node.size != size or node.mtime != at:
                with open(place, "rb", buffering=0) as file:
                    cloud.write(who, path, FileBody(file, size), mtime=check_mtime(at), parents=True)
                stored[0] += 1
        except (OSError, CloudError) as error:
            skipped.append("%s: %s" % (place, reason_of(error)))
        progress.add(size)

    with ThreadPoolExecutor(8) as pool:
        deque(pool.map(lambda item: store(*item), scan_files(source, skipped, cloud, who, into)), maxlen=0)
    progress.end()
    return stored[0], skipped


def scan_files(source: Path, skipped: list[str], cloud: Cloud | None = None, who: Principal = ANONYMOUS,
               into: tuple[str, ...] = ()) -> Iterator[tuple[Path, int]]:
    """(file, bytes) below a directory; given a cloud, its collections are made on the way, empty ones too.

    What is no plain file, cannot be read, or is called what a file before it is called to us, is skipped, and named.
    """
    pending = [source]
    while pending:
        above = pending.pop()
        try:
            if cloud and into + above.relative_to(source).parts:
                make_once(cloud, who, check_path(into + above.relative_to(source).parts))
            with os.scandir(above) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except (CloudError, OSError) as error:
            skipped.append("%s: %s" % (above, reason_of(error)))
            continue
        names: dict[str, str] = {}
        for entry in found:
            try:
                if names.setdefault(key_of(entry.name), entry.name) != entry.name:
                    skipped.append("%s: it is called the same as another one there" % entry.path)
                elif cloud and entry.is_dir() and os.path.samefile(entry.path, cloud.config.data):
                    skipped.append("%s: the data directory itself" % entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat().st_size
                else:
                    skipped.append("%s: not a plain file" % entry.path)
            except OSError as error:
                skipped.append("%s: %s" % (entry.path, reason_of(error)))


def make_once(cloud: Cloud, who: Principal, path: tuple[str, ...]) -> None:
    """Make a collection that may be there already.  raises CloudError"""
    try:
        cloud.make_collection(who, path, parents=True)
    except CloudError as error:
        if error.kind != "exists":
            raise


# ---- doctor

def examine(config: Config) -> Iterator[tuple[bool | None, str]]:
    """Look at everything that is known to go wrong: (is it well? None: nobody could look, sentence)."""
    yield sys.version_info >= (3, 9), "Python %s" % sys.version.split()[0]
    yield sqlite3.sqlite_version_info >= (3, 34), "SQLite %s" % sqlite3.sqlite_version
    yield not hasattr(os, "geteuid") or os.geteuid() != 0, "not running as root"
    usage = shutil.disk_usage(config.data)
    yield usage.free > min(parse_size(config.low_water), usage.total // 50), "%s free on the disk" % format_size(usage.free)
    if os.name == "nt":                          # access lists, which the standard library does not read
        yield None, "not checked: that the data directory is private; see its properties, Security"
    else:
        yield not config.data.stat().st_mode & 0o077, "the data directory is private"
    began = time.monotonic()
    probe = config.data / (".probe-" + secrets.token_hex(4))
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"x")
    sync_file(fd)
    os.close(fd)
    probe.unlink()
    yield time.monotonic() - began < 0.5, "writing to the disk takes %.0f ms" % ((time.monotonic() - began) * 1000)
    kind = file_system_of(config.data)
    if kind:
        yield not kind.startswith(("nfs", "cifs", "smb", "fuse.sshfs", "9p")), "the data lie on %s" % kind
    else:
        yield None, "not checked: that the data lie on a disk of this machine; databases do not belong on network drives"
    now = datetime.now(timezone.utc)
    yield 2025 < now.year < 2100, "the clock says %s" % now.isoformat(timespec="seconds")
    yield from examine_cloud(config)
    yield from examine_server(config)
    if config.tls_cert:
        try:
            yield tls_context(config) is not None, "the certificate can be used"
        except CloudError as error:
            yield False, str(error)


def file_system_of(path: Path) -> str:
    """The kind of file system a path is on, as Linux names it; "" elsewhere.  Databases do not belong on networks (R5)."""
    best = ("", "")
    if os.path.exists("/proc/mounts"):
        with open("/proc/mounts") as mounts:
            for line in mounts:
                _, place, kind, *_ = line.split(" ")
                place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place)          # blanks in it
                if (str(path.resolve()) + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best[0]):
                    best = place, kind
    return best[1]


def examine_cloud(config: Config) -> Iterator[tuple[bool, str]]:
    try:
        with closing(Cloud(config, how="open")) as cloud:
            yield from examine_data(cloud)
    except (CloudError, OSError) as error:       # whatever it is: this is where one comes to hear of it
        yield False, str(error)


def examine_data(cloud: Cloud) -> Iterator[tuple[bool, str]]:
    yield cloud.db.read("PRAGMA quick_check") == [("ok",)], "the database is whole"
    yield cloud.db.read("PRAGMA journal_mode") == [("wal",)], "the database keeps a write-ahead log"
    yield cloud.accounts.is_set_up(), "there is an account"
    numbers = cloud.numbers()
    yield numbers["bad_chunks"] == 0, "%d damaged chunks%s" % (numbers["bad_chunks"], "; run verify, it names the files"
                                                               if numbers["bad_chunks"] else "")
    yield cloud.db.has_index(), "SQLite can index names (FTS5 with trigrams)"
    stood = json.loads(cloud.db.setting("clock") or "[0, 0]")[1]
    yield stood <= cloud.clock.wall() + HOUR, "the clock did not go back"


def examine_server(config: Config) -> Iterator[tuple[bool | None, str]]:
    with closing(Cloud(config)) as cloud:
        url = cloud.db.setting("running")
    said = ask(url, "/healthz").strip() if url else ""
    if url:
        yield said == "ok", "the server at %s says %s" % (url, said or "nothing; has it been killed?")
    else:
        yield None, "no server runs on this data"


# ---- supervisor and workers

def listen(config: Config) -> socket.socket:
    """Bind the listening socket.  raises CloudError"""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    try:
        # Elsewhere this lets us have a port whose last connections are fading; on Windows it would let anybody have ours.
        listener.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((config.host, config.port))
        listener.listen(1024)
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = reason_of(error)
        if getattr(error, "errno", 0) == errno.EADDRINUSE:
            reason = "%s; --port %d takes another" % (
                "a cloudserver runs there already" if '"cloudserver"' in ask(local_url(config, config.port), "/api/v1") else
                "another program uses it", config.port % 65535 + 1)
        raise CloudError("conflict", "cannot listen on %s port %d: %s" % (config.host, config.port, reason)) from error


def ask(url: str, path: str) -> str:
    """What a server on this machine answers to GET, at most 1 KiB; "" if it does not."""
    parts = urlsplit(url)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)            # it is our own machine, by its number
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=4, context=anybody) if parts.scheme == "https" \
        else http.client.HTTPConnection(parts.hostname, parts.port, timeout=4)
    try:
        with closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read(KiB).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def serve(config: Config) -> int:
    """Serve until told to stop; returns the exit code.  raises CloudError"""
    for number in STOP_SIGNALS:                  # until somebody takes over: nothing is under way yet
        signal.signal(number, lambda number, frame: sys.exit(0))
    if hasattr(signal, "SIGHUP"):                # a terminal that closes stops no server
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    start_logging(config)
    listener = listen(config)
    tls_context(config)                          # what can fail without a trace comes first; and what root alone may do
    password = read_first_password(config)
    claim_directory(config.data)
    become_owner(config.data)
    lock = FileLock(config.data / "serve.lock")
    if not lock.acquire(wait=False):
        raise CloudError("conflict", "another server runs on %s" % config.data)
    if config.access_log:
        AccessLog(config.access_log).close()     # can it be written?
    announce(config, listener.getsockname()[1], password)
    workers = config.workers or min(8, os.cpu_count() or 1)
    alone = workers == 1 or not hasattr(os, "fork")
    code = work(config, listener) if alone else Supervisor(config, listener, workers).run()
    if code == 0:
        with suppress(CloudError), closing(Cloud(config, how="open")) as cloud:      # else the next start looks at the database
            cloud.db.run(Statement("DELETE FROM setting WHERE name = 'running'"), frees=True)
        log.info("stopped")
    return code


def become_owner(home: Path) -> None:
    """Started as root on a directory that is somebody's: be that somebody from here on.  raises CloudError

    Else `sudo`, or a container that was given a directory, would leave files that their owner cannot read.
    """
    if not hasattr(os, "geteuid") or os.geteuid() or not home.exists() or not home.stat().st_uid:
        return
    about = home.stat()
    try:
        os.setgroups([])
        os.setgid(about.st_gid)
        os.setuid(about.st_uid)
    except OSError as error:
        raise CloudError("forbidden", "cannot become the owner of %s, uid %d: %s; start it as that user" % (
            home, about.st_uid, error.strerror)) from error


# ---- where we are found

ANYWHERE = {"0.0.0.0": ("127.0.0.1", socket.AF_INET, "192.0.2.1"), "::": ("::1", socket.AF_INET6, "2001:db8::1")}
HERE = ("127.0.0.1", "::1", "localhost")


def format_url(secure: bool, host: str, port: int) -> str:
    shown = "" if port == (443 if secure else 80) else ":%d" % port
    return "%s://%s%s/" % ("https" if secure else "http", "[%s]" % host if ":" in host else host, shown)


def local_url(config: Config, port: int) -> str:
    """How a program on this machine reaches the server."""
    return format_url(bool(config.tls_cert), ANYWHERE.get(config.host, (config.host,))[0], port)


def urls_of(config: Config, port: int) -> list[str]:
    """How people reach the server, the best first."""
    names = [name.strip() for name in config.hostname.split(",") if name.strip()]
    if config.behind_proxy and names:
        return [format_url(True, name, 443) for name in names]
    if config.host in ANYWHERE:                  # from elsewhere only where a password may come that way (N5)
        others = [*addresses_of(config.host), *local_names()] if config.tls_cert or config.plain_http else []
        hosts = [*names, "localhost", *others]
    else:
        hosts = ["localhost"] if config.host in HERE else [*names, config.host]
    return [format_url(bool(config.tls_cert), host, port) for host in dict.fromkeys(hosts)]


def addresses_of(anywhere: str) -> list[str]:
    """The address by which this machine is reached from its network, if it has one; nothing is sent to find out."""
    _, family, far = ANYWHERE[anywhere]
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((far, 9))
        return [probe.getsockname()[0]]
    return []


def local_names() -> list[str]:
    """NAME.local, where something answers for it (RFC 6762)."""
    answers = sys.platform in ("darwin", "win32") or os.path.exists("/run/avahi-daemon/socket")
    return [socket.gethostname().partition(".")[0].lower() + ".local"] if answers else []


def read_first_password(config: Config) -> str | None:
    """The password of the account that --admin names; None if its file is gone, as it may be once the account is there."""
    if not config.admin or not config.admin_password_file.exists():
        return None
    return config.admin_password_file.read_text(encoding="utf-8-sig").rstrip("\r\n")


def announce(config: Config, port: int, password: str | None) -> None:
    """Make the database, and say where to find us; on the very first start, by what link to set up."""
    urls = urls_of(config, port)
    with closing(Cloud(config)) as cloud:
        if cloud.db.setting("running"):
            cloud.db.run(Statement("INSERT OR REPLACE INTO setting VALUES ('unclean', '1')"), frees=True)      # the janitor looks (R22)
        cloud.db.run(Statement("INSERT OR REPLACE INTO setting VALUES ('running', ?)", (local_url(config, port),)), frees=True)
        cloud.keep_reserve()
        at = [*urls, *([local_url(config, port) + " for the proxy"] if config.behind_proxy else [])]
        print("cloudserver serves %s at %s" % (config.data.resolve(), ", ".join(dict.fromkeys(at))))
        if not cloud.accounts.is_set_up():
            invite(config, cloud, urls, password)
    if sys.stdout.isatty():
        print("Ctrl-C stops it.")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        log.warning("running as root; give %s to an account of its own, and the server becomes that account", config.data)
    if not (config.tls_cert or config.plain_http or config.behind_proxy or config.host in HERE):
        log.warning("passwords over plain HTTP from other machines are refused: give a certificate (--tls-cert, --tls-key), "
                    "a proxy (--behind-proxy) or, in a network you trust, --plain-http")
    sys.stdout.flush()


def invite(config: Config, cloud: Cloud, urls: Sequence[str], password: str | None) -> None:
    """Have a first account: the one that --admin names, or that of whoever opens the link.  raises CloudError"""
    if config.admin:
        if password is None:
            raise CloudError("not-found", "there is no %s to read the password of %s from" % (config.admin_password_file, config.admin))
        cloud.accounts.add(config.admin, password, admin=True)
        return
    token = cloud.accounts.new_setup_token()
    links = ["%ssetup#%s" % (url, token) for url in urls]
    print("Not set up yet. Open this link to make your account; it works once:\n\n    %s\n" % "\n    ".join(links))
    elsewhere = next((link for link in links if "//localhost" not in link), None)
    if elsewhere and sys.stdout.isatty():
        show_qr(elsewhere)                       # a phone can reach us, and has a camera


def show_qr(text: str) -> None:
    with suppress(UnicodeEncodeError):           # a terminal without these blocks
        code = format_qr(qr_code(text))
        code.encode(sys.stdout.encoding or "ascii")
        print(code, "\n")


def work(config: Config, listener: socket.socket, lifeline: int | None = None, balance: Balance | None = None) -> int:
    """Be a worker until told to stop; returns the exit code."""
    cloud = Cloud(config)
    server, janitor = CloudServer(cloud, listener, lifeline, balance), Janitor(cloud)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(1) if server.stopping else server.stop())
    if server.access_log and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: server.access_log.reopen())
    janitor.start()
    server.serve_forever()
    janitor.stop()
    with suppress(CloudError):                   # a disk that fails does not keep us
        cloud.accounts.save_used()
        cloud.db.save_clock()
    if not server.active:
        cloud.close()
    return 0


class Supervisor:
    """Forks the workers, replaces one that dies, and passes on the signal to stop."""

    def __init__(self, config: Config, listener: socket.socket, count: int) -> None:
        self.config, self.listener, self.count = config, listener, count
        self.pids: dict[int, tuple[int, float]] = {}             # pid: (index, since when)
        self.ended = threading.Event()           # told to stop
        self.pause = 0.2                         # seconds before a worker is replaced
        self.lifeline, self._end = os.pipe()     # only the supervisor keeps the writing end
        self.balance = Balance(count)

    def run(self) -> int:
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._pass_on)
        for index in range(self.count):
            self._fork(index)
        while self.pids:
            pid, status = os.wait()
            index, since = self.pids.pop(pid, (None, 0))
            if index is not None and not self.ended.is_set():
                self._replace(index, status, time.monotonic() - since)
        return 0

    def _replace(self, index: int, status: int, life: float) -> None:
        """Start another worker; where they end as they begin, after a longer and longer while."""
        self.pause = min(30, 2 * self.pause) if life < 10 else 0.2
        log.error("worker %d ended (status %d); starting another in %.1f s", index, os.waitstatus_to_exitcode(status), self.pause)
        if not self.ended.wait(self.pause):
            self._fork(index)

    def _fork(self, index: int) -> None:
        signals = {*STOP_SIGNALS, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)        # a child must never run our handler
        pid = os.fork()
        if pid:
            self.pids[pid] = index, time.monotonic()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            if self.ended.is_set():
                os.kill(pid, signal.SIGTERM)     # our handler ran before it knew of this one
            return
        code = 1
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            os.close(self._end)
            keep_on_core(index)
            self.balance.index = index
            self.balance.set(0)
            code = work(self.config, self.listener, self.lifeline, self.balance)
        except BaseException:
            log.exception("worker")
        finally:
            os._exit(code)

    def _pass_on(self, number: int, frame: Any) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):   # it has just ended
                os.kill(pid, number)

    def _stop(self, number: int, frame: Any) -> None:
        self._pass_on(signal.SIGKILL if self.ended.is_set() else signal.SIGTERM, frame)       # the second time, at once
        self.ended.set()


def keep_on_core(index: int) -> None:
    """Keep a worker on one core: its threads then never fight over the GIL across cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


# ==== 15. Sync client ====================================================================
#
# Two-way sync of a folder with a server, over the sync protocol and nothing else.
# 1. Each side is compared with what both last agreed on (base), never with the other.
# 2. Nothing is deleted that is not remembered as synced, or that has changed since.
# 3. A file is built beside its place and put there at once; what is there by then is looked at once more before.
# 4. The base is noted after it is true on both sides: whoever is killed only has to compare again.
# 5. An answer that is not whole says nothing about what is gone.

SYNC_HOME = ".cloudserver"      # the folder's own corner: state, lock, files under construction
CUT_LEAST, CUT_MOST = MiB, 8 * MiB      # bytes of a chunk where content decides; smaller files than CHUNK_SIZE are one
CUT_MARK = re.compile(rb"[\x05\x17\x2b\x3a\x4c\x5f\x61\x76\x88\x93\xa9\xb4\xc2\xd7\xe6\xfb]{5}")    # once per MiB of random bytes
COMMIT_FILES, COMMIT_BYTES = 2_000, 8 * MiB      # of one commit, and of one download
LANES = 2                       # requests under way while the next is prepared
WINDOW = 4 * MiB                # bytes of a large file after which its chunks travel
ROUNDS = 12                     # until a run gives up to reach a fixed point
BRAKE_LEAST = 50                # deletions that never stop a run
SCAN_LEAST, SCAN_MOST = 1.0, 15.0       # seconds between two looks at a watched folder
NOT_A_FILE = "is neither file nor directory"
JUNK = (".DS_Store", "Thumbs.db", "desktop.ini", "._*", "~$*", ".~lock.*#", "*.partial", ".cloudserver/")


class There(NamedTuple):
    """A node on the server."""
    path: str
    node: str
    kind: int
    etag: str
    size: int
    mtime: int                   # ms since 1970
    content: str                 # names its bytes (manifest_of); "" of a collection
    chunks: str                  # JSON: [[hash, size], ...] if there are several


class Base(NamedTuple):
    """What both sides agreed on: as it is There, and by what it is known Here."""
    path: str
    node: str
    kind: int
    etag: str
    size: int
    mtime: int
    content: str
    chunks: str
    mtime_ns: int = 0
    inode: int = 0


class Here(NamedTuple):
    """A file or directory of the folder."""
    path: str
    kind: int
    size: int
    mtime_ns: int
    inode: int


class Stopped(Exception):
    """A run must not go on.  code: the exit code, 1 or 3 (the brake)"""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


DECISIONS = {  # (here against base, there against base): what to do
    ("same", "same"): "", ("none", "none"): "",
    ("same", "changed"): "download", ("none", "new"): "download", ("gone", "changed"): "download",
    ("changed", "same"): "upload", ("new", "none"): "upload", ("changed", "gone"): "upload",        # edits beat deletes
    ("gone", "same"): "delete there", ("same", "gone"): "delete here", ("gone", "gone"): "forget",
    ("changed", "changed"): "compare", ("new", "new"): "compare"}


def state_here(base: Base | None, here: Here | None) -> str:
    """How a file stands against base; one that became a directory, or the other way, is gone first."""
    if base is None:
        return "new" if here else "none"
    if here is None or here.kind != base.kind:
        return "gone"
    same = here.kind or (here.size, here.mtime_ns, here.inode) == (base.size, base.mtime_ns, base.inode)
    return "same" if same else "changed"


def state_there(base: Base | None, there: There | None) -> str:
    if base is None:
        return "new" if there else "none"
    if there is None or there.kind != base.kind:
        return "gone"
    return "same" if there.node == base.node and (there.kind or there.etag == base.etag) else "changed"


# ---- names

def compile_patterns(lines: Iterable[str]) -> Callable[[str, bool], bool]:
    """A test for paths from lines like those of .gitignore: the last that fits decides, "!" takes back.

    The test wants a path without slashes at its ends and whether it is a directory; what lies below an ignored
    directory is not its business.
    """
    rules = []
    for line in lines:
        line = line.rstrip("\r\n").rstrip(" ")
        if not line or line.startswith("#"):
            continue
        keep, line = line.startswith("!"), line[1:] if line[0] in "!\\" else line
        only_directories, line = line.endswith("/"), line.rstrip("/")
        anchored, line = "/" in line, line.lstrip("/")
        rules.append((re.compile(("" if anchored else "(?:.*/)?") + pattern_text(line), re.S), only_directories, not keep))

    def ignores(path: str, is_directory: bool) -> bool:
        for rule, only_directories, verdict in reversed(rules):
            if (is_directory or not only_directories) and rule.fullmatch(path):
                return verdict
        return False
    return ignores


def pattern_text(glob: str) -> str:
    """A glob as a regular expression: * and ? stop at slashes, ** does not."""
    parts = {"/**/": "/(?:.*/)?", "**/": "(?:.*/)?", "/**": "/.*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts[part] if part in parts else part if re.fullmatch(r"\[[^\]/]+\]", part) else re.escape(part)
                   for part in re.findall(r"/\*\*/|\*\*/|/\*\*|\*\*|\*|\?|\[[^\]/]+\]|.", glob, re.S))


class Scan(NamedTuple):
    """One look at the folder."""
    here: dict[str, Here]
    blocked: dict[str, str]      # keys that cannot be synced, with all below: why
    seconds: float


class LocalFolder:
    """The folder on this computer; the only code of the client that touches its files.

    Paths are relative with slashes.  A key is what names are compared by here: NFC, and without case where the file
    system cannot tell cases apart.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, str(root)
        self.home = root / SYNC_HOME
        self.folds = False

    def open(self) -> None:
        """Make our corner, and find out what the file system can tell apart."""
        make_private_directory(self.home)
        (self.home / "tmp").mkdir(exist_ok=True)
        for left in (self.home / "tmp").iterdir():
            if not left.name.startswith("part-") or time.time() - left.stat().st_mtime > 7 * 86_400:
                left.unlink()
        probe = self.home / "Probe"
        probe.touch()
        self.folds = (self.home / "pROBE").exists()

    def key(self, path: str) -> str:
        key = key_of(path)
        return key.casefold() if self.folds else key

    def place(self, path: str) -> str:
        return os.path.join(self.top, *path.split("/")) if os.name == "nt" else self.top + "/" + path

    def holds_names(self, names: Sequence[str]) -> bool:
        """Can this system have files of these names?"""
        return (os.name != "nt" or all(map(is_windows_name, names))) and SYNC_HOME not in names

    def ignored(self) -> Callable[[str, bool], bool]:
        """The test of .cloudignore."""
        try:
            lines = (self.root / ".cloudignore").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return compile_patterns([*JUNK, *lines, "/" + SYNC_HOME + "/"])

    def scan(self, leaves_out: Callable[[str, bool], bool]) -> Scan:
        """Everything that is here and not left out."""
        began, found, blocked, pending = time.monotonic(), {}, {}, [""]
        while pending:
            above = pending.pop()
            try:
                with os.scandir(self.place(above) if above else self.top) as entries:
                    for entry in entries:
                        path = above + "/" + entry.name if above else entry.name
                        here = self._look(entry, path, leaves_out, blocked)
                        key = here and self.key(path)
                        if here is None:
                            continue
                        if key in found:
                            blocked[key] = "%s and %s cannot be told apart" % (found[key].path, path)
                            continue
                        found[key] = here
                        if here.kind:
                            pending.append(path)
            except OSError as error:
                if not above:
                    raise Stopped("cannot read %s: %s" % (self.top, error.strerror)) from error
                blocked[self.key(above)] = "cannot be read: %s" % error.strerror
        return Scan(found, blocked, time.monotonic() - began)

    def _look(self, entry: os.DirEntry[str], path: str, leaves_out: Callable[[str, bool], bool],
              blocked: dict[str, str]) -> Here | None:
        is_directory = entry.is_dir(follow_symlinks=False)
        if leaves_out(path, is_directory):
            return None
        if not is_directory and not entry.is_file(follow_symlinks=False):
            blocked[self.key(path)] = NOT_A_FILE
            return None
        if not path.isascii() and not is_unicode(path):
            blocked[path] = "its name is not Unicode"
            return None
        try:
            return here_of(path, entry.stat(follow_symlinks=False))
        except OSError:
            return None                          # it went while we looked

    def look(self, path: str) -> Here | None:
        """One file or directory as it is now."""
        try:
            return here_of(path, os.lstat(self.place(path)))
        except OSError:
            return None

    def read(self, path: str) -> BinaryIO:
        return open(os.open(self.place(path), os.O_RDONLY | O_EXTRA), "rb", buffering=0)

    def holds(self, path: str, content: str, chunks: Sequence[Sequence[Any]]) -> bool:
        """Are the bytes of a file those?"""
        with self.read(path) as file:
            seen = [(hashlib.sha256(file.read(size)).hexdigest(), size) for _, size in chunks]
            return not file.read(1) and (manifest_of(seen) if seen else EMPTY) == content

    def temporary(self, name: str = "") -> BinaryIO:
        """A file under construction; under a name it is found again by a later run."""
        return open(self.home / "tmp" / (name or secrets.token_hex(8)), "a+b" if name else "xb")

    def settle(self, temporary: BinaryIO, path: str, mtime: int, expected: Here | None) -> Here | None:
        """Put a finished file in its place, if what is there is still what we saw; None if not."""
        temporary.flush()
        os.utime(temporary.name, ns=(mtime * 1_000_000,) * 2)
        about = os.fstat(temporary.fileno())
        temporary.close()
        if self.look(path) != expected:
            os.unlink(temporary.name)
            return None
        os.replace(temporary.name, self.place(path))
        return here_of(path, about)

    def make_directory(self, path: str) -> Here:
        os.makedirs(self.place(path), exist_ok=True)
        return self.look(path)

    def rename(self, old: str, new: str) -> None:
        """raises OSError; nothing is ever replaced"""
        if self.key(old) != self.key(new) and os.path.lexists(self.place(new)):
            raise FileExistsError(errno.EEXIST, "something is there", new)
        os.makedirs(os.path.dirname(self.place(new)), exist_ok=True)
        os.rename(self.place(old), self.place(new))

    def remove(self, path: str, kind: int, leaves_out: Callable[[str, bool], bool]) -> bool:
        """Remove a file, or a directory that holds nothing but junk; False if it holds more."""
        place = self.place(path)
        if not kind:
            os.unlink(place)
            return True
        junk = compile_patterns(JUNK)
        names = os.listdir(place)
        if not all(junk(name, False) for name in names):
            return False
        for name in names:
            os.unlink(os.path.join(place, name))
        os.rmdir(place)
        return True

    def sync(self) -> None:
        """Bring what was written to the medium, before it is noted as being here."""
        if hasattr(os, "sync"):
            os.sync()


def here_of(path: str, about: os.stat_result) -> Here:
    is_directory = (about.st_mode & 0o170000) == 0o040000
    return Here(path, int(is_directory), 0 if is_directory else about.st_size, 0 if is_directory else about.st_mtime_ns,
                about.st_ino)


def is_unicode(text: str) -> bool:
    try:
        return bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def cut_by_content(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file in chunks that end where the content says so: an insertion moves only those around it."""
    data, at, ended = b"", 0, False
    while True:
        if len(data) - at < CUT_MOST and not ended:
            more = file.read(2 * CUT_MOST)
            ended = not more
            data, at = data[at:] + more, 0
            continue
        if at == len(data):
            return
        found = CUT_MARK.search(data, at + CUT_LEAST, at + CUT_MOST)
        stop = found.end() if found else min(at + CUT_MOST, len(data))
        yield data[at:stop]
        at = stop


# ---- the other end

class Link:
    """A connection to the server.  Every call may be repeated: asking changes nothing, and a commit has its id."""

    def __init__(self, url: str, authorization: str, agent: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Stopped("%s is not the address of a server, like https://ann@cloud.example" % url, 2)
        self.secure, self.host, self.port = parts.scheme == "https", parts.hostname, parts.port
        self.prefix = parts.path.rstrip("/")
        self.fields = {"Authorization": authorization, "User-Agent": agent}
        self._mine = threading.local()               # each thread has a connection of its own
        self._opened: list[http.client.HTTPConnection] = []
        self.sent = self.received = 0

    def _connect(self) -> http.client.HTTPConnection:
        connection = getattr(self._mine, "connection", None)
        if connection is None:
            how = {"context": ssl.create_default_context()} if self.secure else {}
            kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
            connection = self._mine.connection = kind(self.host, self.port, timeout=90, **how)
            self._opened.append(connection)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _drop(self) -> None:
        """This thread's connection is of no use any more."""
        connection, self._mine.connection = getattr(self._mine, "connection", None), None
        if connection:
            self._opened.remove(connection)
            connection.close()

    def close(self) -> None:
        for connection in self._opened:
            connection.close()

    def call(self, method: str, path: str, body: bytes | None = None, *, tries: int = 5) -> dict[str, Any]:
        """An answer in JSON.  raises CloudError as the server refuses, Stopped when it cannot be reached or turns us away"""
        with self.open(method, path, body, tries=tries) as response:
            data = response.read()
            self.received += len(data)
            return json.loads(data) if data else {}

    @contextmanager
    def open(self, method: str, path: str, body: bytes | None = None, *, tries: int = 5) -> Iterator[http.client.HTTPResponse]:
        """As call, with the body to be read."""
        response = self._ask(method, path, body, tries)
        try:
            yield response
        finally:
            if not response.isclosed():
                self._drop()                     # the rest of an answer that nobody wants

    def _ask(self, method: str, path: str, body: bytes | None, tries: int) -> http.client.HTTPResponse:
        for attempt in range(1, tries + 1):
            try:
                connection = self._connect()
                connection.request(method, self.prefix + path, body, self.fields)
                self.sent += len(body or b"")
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if attempt == tries or isinstance(error, ssl.SSLError):
                    raise Stopped("cannot reach %s: %s" % (self.host, error or type(error).__name__)) from error
                time.sleep(0.1 * 2 ** attempt)
                continue
            if response.status < 300:
                return response
            error = self._refusal(response)
            if response.status not in (429, 503) or attempt == tries:
                raise error
            time.sleep(min(30, int(response.getheader("Retry-After") or 1)))
        raise Stopped("cannot reach %s" % self.host)

    def _refusal(self, response: http.client.HTTPResponse) -> Exception:
        data = response.read(MiB)
        try:
            problem = json.loads(data)
            code, detail = problem["code"], problem["detail"]
        except (ValueError, KeyError, TypeError):
            return Stopped("%s does not answer as a cloudserver: status %d" % (self.host, response.status))
        if response.status == 401:
            return Stopped("the server does not let this device in any more (%s); nothing was touched" % detail)
        return CloudError(code if code in ERRORS else "internal", detail, missing=problem.get("missing"))


# ---- what both sides agreed on

class SyncState:
    """The memory of a folder, in its corner: base and there by key, and some words."""

    TREES = {"there": There, "base": Base}

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        for name, kind in self.TREES.items():
            self.db.execute("CREATE TABLE IF NOT EXISTS %s (key TEXT PRIMARY KEY, %s) WITHOUT ROWID" % (
                name, ", ".join(kind._fields)))
        self.db.execute("CREATE TABLE IF NOT EXISTS word (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self.words = dict(self.db.execute("SELECT name, value FROM word"))
        self.there: dict[str, There] = {there.path if key == there.path else key: there for key, there in (
            (row[0], There._make(row[1:])) for row in self.db.execute("SELECT * FROM there"))}
        self.base: dict[str, Base] = {row[0]: self._with_words_of(self.there.get(row[0]), Base._make(row[1:]))
                                      for row in self.db.execute("SELECT * FROM base")}
        self._changed: dict[str, set[str]] = {"there": set(), "base": set()}

    def _with_words_of(self, there: There | None, base: Base) -> Base:
        """The same, sharing its strings with what is on the server: they are most of our memory."""
        return Base(*there, *base[8:]) if there == base[:8] else base

    @property
    def cursor(self) -> int:
        return int(self.words.get("cursor", -1))

    def say(self, **words: Any) -> None:
        self.words.update((name, str(value)) for name, value in words.items())

    def set(self, tree: str, key: str, value: There | Base | None) -> None:
        mine = getattr(self, tree)
        if value is not None:
            mine[key] = value
        elif mine.pop(key, None) is None:
            return
        self._changed[tree].add(key)

    def agree(self, key: str, there: There, here: Here) -> None:
        """Both sides are the same now."""
        self.set("there", key, there)
        self.set("base", key, Base(*there, here.mtime_ns, here.inode))

    def below(self, tree: str, key: str) -> list[str]:
        """Keys in a tree at and below one, from the top."""
        mine, prefix = getattr(self, tree), key + "/"
        if key in mine and not mine[key].kind:
            return [key]
        return [key] * (key in mine) + sorted(other for other in mine if other.startswith(prefix))

    def forget(self, key: str) -> None:
        for tree in self.TREES:
            for other in self.below(tree, key):
                self.set(tree, other, None)

    def take(self, tree: str, key: str, path: str) -> list[tuple[str, str, Any]]:
        """Take a node with all below it out of a tree: [(rest of key, rest of path, value), ...]."""
        taken = []
        for other in self.below(tree, key):
            value = getattr(self, tree)[other]
            taken.append((other[len(key):], value.path[len(path):], value))
            self.set(tree, other, None)
        return taken

    def put_back(self, tree: str, taken: list[tuple[str, str, Any]], key: str, path: str) -> None:
        for rest_key, rest_path, value in taken:
            self.set(tree, key + rest_key, value._replace(path=path + rest_path))

    def flush(self) -> None:
        """Write down what changed, all or nothing."""
        self.db.execute("BEGIN")
        for tree, kind in self.TREES.items():
            mine, keys = getattr(self, tree), self._changed[tree]
            self.db.executemany("DELETE FROM %s WHERE key = ?" % tree, [(key,) for key in keys if key not in mine])
            self.db.executemany("INSERT OR REPLACE INTO %s VALUES (?%s)" % (tree, ", ?" * len(kind._fields)),
                                [(key, *mine[key]) for key in keys if key in mine])
            keys.clear()
        self.db.executemany("INSERT OR REPLACE INTO word VALUES (?, ?)", self.words.items())
        self.db.execute("COMMIT")

    def close(self) -> None:
        self.flush()
        self.db.close()


@dataclass
class Tally:
    """What a run did; the summary and --json."""
    uploaded: int = 0
    downloaded: int = 0
    moved: int = 0
    deleted_here: int = 0
    deleted_there: int = 0
    conflicts: int = 0
    skipped: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    def work(self) -> int:
        return self.uploaded + self.downloaded + self.moved + self.deleted_here + self.deleted_there + self.conflicts


def there_of(about: dict[str, Any]) -> There:
    """A node as the protocol tells it."""
    if about["kind"] == "collection":
        return There(about["path"], about["node"], COLLECTION, "", 0, about["mtime"], "", "")
    chunks = [tuple(chunk) for chunk in about["chunks"]]
    return There(about["path"], about["node"], FILE, about["etag"], about["size"], about["mtime"],
                 manifest_of(chunks) if chunks else EMPTY, json.dumps(chunks) if len(chunks) > 1 else "")


def chunks_of(node: There | Base) -> list[tuple[str, int]]:
    """(hash, size) of its chunks."""
    if node.chunks:
        return [(hash, size) for hash, size in json.loads(node.chunks)]
    return [(node.content, node.size)] if node.size else []


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


# ---- a run

class Plan:
    """What a round will do, by key."""

    def __init__(self) -> None:
        self.actions: dict[str, str] = {}

    def of(self, *actions: str) -> list[str]:
        """Keys in the order of paths, so that collections come before what they hold."""
        return sorted(key for key, action in self.actions.items() if action in actions)

    def settle_directories(self, state: SyncState, scan: Scan, left_out: set[str]) -> None:
        """A directory goes only if all that is below goes too; what is left out stays, and what holds it."""
        stays: set[str] = set()
        quiet = {above for key in left_out for above in lineage(key)}
        for key in sorted(self.actions, reverse=True):
            action = self.actions[key]
            if key in stays and action in ("delete there", "delete here"):
                action = "download" if action == "delete there" else "upload"
                ours, theirs = scan.here.get(key), state.there.get(key)
                self.actions[key] = "compare" if ours and theirs and ours.kind != theirs.kind else action
            elif key in quiet and action == "delete there":
                del self.actions[key]
            if action not in ("delete there", "delete here", "forget"):
                stays.add(parent_of(key))


def lineage(key: str) -> Iterator[str]:
    """A key and those of what holds it, upwards."""
    while key:
        yield key
        key = parent_of(key)


class SyncClient:
    """Keeps a folder and an account alike: run() once, or watch()."""

    def __init__(self, folder: LocalFolder, state: SyncState, link: Link, *, only: Sequence[str] = (), yes: bool = False,
                 show: bool = False) -> None:
        self.folder, self.state, self.link, self.yes = folder, state, link, yes
        self.only = [folder.key("/".join(split_path(path))) for path in only]
        self.tally = Tally()
        self.problems: dict[str, str] = {}           # what could not be synced in this run, by key
        self.twins: dict[str, str] = {}              # what the server tells apart and this computer does not, by path
        self.kept: dict[str, str] = {}               # directories that stay because of what is left out
        self.unsettled: set[str] = set()             # paths that changed while they were read
        self.scan = Scan({}, {}, 0.0)
        self.progress = Progress("sync", 0) if show else None
        self.lane = ThreadPoolExecutor(LANES, "sync")
        self.flying: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
        self.held = self.moved_there = False
        self.lock: FileLock | None = None            # held for as long as we live
        self.seen: list[int | None] = []             # cursors that commits were answered with
        self.remembered, self.unsynced = 0.0, False

    def run(self) -> Tally:
        """Go on until both sides are alike.  raises Stopped, CloudError"""
        began, self.tally, self.problems, self.kept = time.monotonic(), Tally(), {}, {}
        sent, received = self.link.sent, self.link.received
        for turn in range(ROUNDS):
            self.fetch()
            self.look()
            self.follow_moves()
            self._advance()
            plan = self.plan()
            if not plan.actions:
                break
            self.check_brake(plan)
            before, self.unsettled = self.tally.work(), set()
            self.execute(plan)
            self._remember(now=True)
            if self.held:
                raise Stopped("the server holds this device because it deletes or overwrites so much; "
                              "allow or undo it on the page", 3)
            if self.tally.work() == before:
                if not self.unsettled or turn > 2:
                    break
                time.sleep(0.2)                  # somebody writes to a file: once more
        for path in self.unsettled:
            self._complain(path, "it changes while it is read")
        for path, reason in self.twins.items():
            self._complain(path, reason)
        for key, reason in self.scan.blocked.items():
            if reason != NOT_A_FILE:
                self._complain(key, reason)
        self.state.flush()
        self.tally.skipped = len(self.problems) + len(self.kept) + sum(
            reason == NOT_A_FILE for reason in self.scan.blocked.values())
        self.tally.bytes_up, self.tally.bytes_down = self.link.sent - sent, self.link.received - received
        self.tally.seconds = round(time.monotonic() - began, 3)
        return self.tally

    # ---- what is there

    def fetch(self) -> None:
        """Bring our picture of the server up to date (invariant 5)."""
        state = self.state
        if state.cursor >= 0:
            try:
                while self._fetch_changes():
                    pass
                return
            except CloudError as error:
                if error.kind != "gone":
                    raise
        self._fetch_manifest()

    def _fetch_changes(self) -> bool:
        state = self.state
        answer = self.link.call("GET", "/api/v1/changes?since=%d&chunks=1&limit=10000&server=%s" % (
            state.cursor, state.words["server"]))
        if answer["changes"]:
            self._apply(answer["changes"])
        state.say(cursor=answer["seq"])
        return answer["more"]

    def _apply(self, changes: list[dict[str, Any]]) -> None:
        """Take out what was touched, the deepest first, so that each takes along only what stays with it; then put back."""
        state, found = self.state, {about["node"]: about for about in changes}
        old = sorted(((key, there) for key, there in state.there.items() if there.node in found),
                     key=lambda item: item[0].count("/"), reverse=True)
        taken = {there.node: state.take("there", key, there.path) for key, there in old}
        for about in sorted(changes, key=lambda about: (about["path"] or "").count("/")):
            if about["path"] is None:
                continue
            key = self.folder.key(about["path"])
            if key in state.there and state.there[key].node != about["node"]:
                self.twins[about["path"]] = "cannot be told apart from %s here" % state.there[key].path
                continue
            state.put_back("there", taken.get(about["node"], []), key, about["path"])
            state.set("there", key, there_of(about))
        self.moved_there = True

    def _fetch_manifest(self) -> None:
        """Everything anew.  Another server, or one restored from a backup, agreed on nothing with us."""
        state, found, first, last = self.state, [], None, None
        with self.link.open("GET", "/api/v1/manifest?chunks=1") as response:
            for line in response:
                self.link.received += len(line)
                about = json.loads(line)
                if "path" in about:
                    found.append(there_of(about))
                first, last = first or about, about
        if first is None or last != {"end": True, "count": len(found)}:
            raise Stopped("the answer of the server broke off; nothing was touched")
        known = state.words.get("server")
        if known not in (None, first["server"]):
            if not self.yes:
                raise Stopped("this is not the server it was, or it was restored from a backup; nothing was touched. "
                              "With --yes both sides are merged and nothing is deleted", 3)
            for key in list(state.base):
                state.set("base", key, None)
        for key in list(state.there):
            state.set("there", key, None)
        self.twins = {}
        for there in found:
            key = self.folder.key(there.path)
            if key in state.there:
                self.twins[there.path] = "cannot be told apart from %s here" % state.there[key].path
            else:
                state.set("there", key, there)
        state.say(server=first["server"], cursor=first["seq"])
        self.moved_there = True

    def look(self) -> None:
        """Scan the folder."""
        self.leaves_out = self.folder.ignored()
        self.scan = Scan({}, {}, 0.0)                # two of them would be much memory
        self.scan = self.folder.scan(self.leaves_out)

    # ---- moves

    def follow_moves(self) -> None:
        """Renames cost a rename: first those on the server, then ours."""
        moved, self.moved_there = self.moved_there, False
        while moved:                             # once more for what was moved out of something that was moved
            moved = self._follow_there()
        moved = True
        while moved:
            gone = [key for key, base in self.state.base.items() if key not in self.scan.here or self._is_respelled(key, base)]
            moved = bool(gone) and self._follow_here(gone)

    def _follow_there(self) -> bool:
        """What has another path there is renamed here; was anything?"""
        state, here, before = self.state, self.scan.here, self.tally.moved
        by_node = {there.node: key for key, there in state.there.items()}
        moved = [key for key, base in state.base.items() if by_node.get(base.node, key) != key
                 or base.node in by_node and state.there[by_node[base.node]].path != base.path]
        for key in sorted(moved, key=lambda key: (key.count("/"), key)):
            base = state.base.get(key)
            new = by_node[base.node] if base else key
            there = state.there.get(new)
            if base is None or base.path == there.path or not self._wanted(new) or (
                    state_here(base, here.get(key)) != "same" or new != key and (new in here or new in state.base)):
                continue                         # a parent took it along, or something is in the way
            try:
                self.folder.rename(base.path, there.path)
            except OSError as error:
                self._complain(there.path, error)
                continue
            self._rekey("base", key, base.path, new, there.path)
            for other in [other for other in here if other == key or other.startswith(key + "/")]:
                old = here.pop(other)
                here[new + other[len(key):]] = old._replace(path=there.path + old.path[len(base.path):])
            self.tally.moved += 1
        return self.tally.moved > before

    def _rekey(self, tree: str, key: str, path: str, new: str, new_path: str) -> None:
        self.state.put_back(tree, self.state.take(tree, key, path), new, new_path)

    def _is_respelled(self, key: str, base: Base) -> bool:
        """Has only the case of its name changed, where the file system cannot tell cases apart?"""
        return self.folder.folds and key_of(base.path.rpartition("/")[2]) != key_of(self.scan.here[key].path.rpartition("/")[2])

    def _follow_here(self, gone: list[str]) -> bool:
        """What vanished in one place and turned up in another, told by inode, or by time and content; was anything moved?"""
        state, here = self.state, self.scan.here
        fresh = [(key, found) for key, found in here.items() if key not in state.base and key not in state.there]
        twins: dict[Any, list[str]] = {}
        for key, found in fresh:
            twins.setdefault((found.kind, found.inode), []).append(key)
            if not found.kind:
                twins.setdefault((found.size, found.mtime_ns), []).append(key)
        steps: list[tuple[str, str]] = []
        for key in sorted(gone, key=lambda key: (key.count("/"), key)):
            base = state.base.get(key)
            if base is None or any(key.startswith(old + "/") for old, _ in steps) or state_there(base, state.there.get(key)) != "same" \
                    or not self._wanted(key) or self._blocked(key):
                continue
            new = key if key in here else next((new for new in (*twins.get((base.kind, base.inode), ()), *twins.get((base.size, base.mtime_ns), ()))
                        if self._is_moved(key, base, new) and all(new != taken for _, taken in steps)), None)
            if new is not None:
                steps.append((key, new))
        return any([self._move_there(some) for some in pieces(steps)])

    def _is_moved(self, key: str, base: Base, new: str) -> bool:
        found = self.scan.here[new]
        if found.kind != base.kind:
            return False
        if base.kind:                            # an inode may be used again: something in it must be known
            inside = [other for other in self.state.base if other.startswith(key + "/")]
            return not inside or any(new + other[len(key):] in self.scan.here for other in inside)
        if (found.size, found.mtime_ns) != (base.size, base.mtime_ns):
            return False
        return found.inode == base.inode or self._holds(found.path, base)

    def _holds(self, path: str, node: There | Base) -> bool:
        try:
            return self.folder.holds(path, node.content, chunks_of(node))
        except OSError:
            return False

    def _move_there(self, moves: list[tuple[str, str]]) -> bool:
        state, steps, made = self.state, [], set()
        for key, new in moves:
            path, above = self.scan.here[new].path, []
            while parent_of(path) and self.folder.key(parent_of(path)) not in state.there:
                path = parent_of(path)
                above.append(path)
            steps += [{"mkdir": path} for path in reversed(above) if path not in made]
            made.update(above)
            steps.append({"move": state.base[key].path, "to": self.scan.here[new].path,
                          **({} if state.base[key].kind else {"if": state.base[key].etag})})
        answers = iter(self._commit(steps, b""))
        outcomes = [next(answers) for step in steps]
        for step, outcome in zip(steps, outcomes):
            if "mkdir" in step and outcome["status"] < 300:
                key = self.folder.key(step["mkdir"])
                state.set("there", key, There(step["mkdir"], outcome["node"], COLLECTION, "", 0, 0, "", ""))
        done = [outcome["status"] < 300 for step, outcome in zip(steps, outcomes) if "move" in step]
        for (key, new), well in zip(moves, done):
            if well:
                old, path = state.base[key].path, self.scan.here[new].path
                for tree in state.TREES:
                    self._rekey(tree, key, old, new, path)
                self.tally.moved += 1
        return any(done)

    # ---- deciding

    def _wanted(self, key: str) -> bool:
        return not self.only or any((key + "/").startswith(only + "/") or (only + "/").startswith(key + "/") for only in self.only)

    def _blocked(self, key: str) -> bool:
        """Is it, or something that holds it, what we cannot sync?"""
        return bool(self.scan.blocked) and any(above in self.scan.blocked for above in lineage(key))

    def _left_out(self, key: str) -> bool:
        """Is it outside of what is synced?"""
        if not self._wanted(key) or self._blocked(key):
            return True
        node = self.state.there.get(key) or self.state.base.get(key)
        if node is None:
            return False                         # it is here, so the scan has let it through
        parts = node.path.split("/")
        return any(self.leaves_out("/".join(parts[:n]), n < len(parts) or bool(node.kind)) for n in range(1, len(parts) + 1))

    def plan(self) -> Plan:
        """Compare each side with base."""
        state, here, plan, left_out = self.state, self.scan.here, Plan(), set()
        for key in {*state.base, *state.there, *here}:
            base, ours, theirs = state.base.get(key), here.get(key), state.there.get(key)
            action = DECISIONS[state_here(base, ours), state_there(base, theirs)]
            if not action:
                continue
            if action in ("download", "upload") and ours and theirs and ours.kind != theirs.kind:
                action = "compare"               # one made a file where the other has a directory
            if self._left_out(key) or key in self.problems or action == "download" and not self._can_be_here(key):
                left_out.add(key)
            else:
                plan.actions[key] = action
        if plan.actions:
            plan.settle_directories(state, self.scan, left_out)
        return plan

    def _can_be_here(self, key: str) -> bool:
        """Can this computer hold the name?  If not it stays on the server, and is not gone."""
        path = self.state.there[key].path
        names = path.split("/")
        if self.folder.holds_names(names):
            return True
        self._complain(path, "this computer cannot hold the name")
        return False

    def check_brake(self, plan: Plan) -> None:
        """raises Stopped when a run would delete most of what there is"""
        count = sum(action in ("delete here", "delete there") and not self.state.base[key].kind
                    for key, action in plan.actions.items())
        files = sum(not base.kind for base in self.state.base.values())
        if count > BRAKE_LEAST and count * 2 > files and not self.yes:
            raise Stopped("%d of %d files would be deleted; nothing was touched. With --yes it is done" % (count, files), 3)

    # ---- doing

    def execute(self, plan: Plan) -> None:
        """In an order that is safe at every instant: copies first, deletions last."""
        if self.progress:
            self.progress.total += sum(self._size_of(key) for key in plan.of("upload", "download", "compare"))
        for key in plan.of("compare"):
            self._compare(key)
        self._make_directories(plan)
        self._upload([key for key in plan.of("upload") if not self.scan.here[key].kind])
        self._download([key for key in plan.of("download") if not self.state.there[key].kind])
        self._delete_here(plan.of("delete here"))
        self._delete_there(plan.of("delete there"))
        for key in plan.of("forget"):
            self.state.set("base", key, None)
        self._advance()
        if self.progress:
            self.progress.end()

    def _size_of(self, key: str) -> int:
        return (self.scan.here.get(key) or self.state.there[key]).size

    def _complain(self, path: str, problem: Any) -> None:
        self.problems[self.folder.key(path)] = "%s: %s" % (path, getattr(problem, "strerror", None) or problem)

    def _compare(self, key: str) -> None:
        """Both sides have something new: the same, or a conflict, of which ours takes another name."""
        state, there, here = self.state, self.state.there[key], self.scan.here[key]
        if there.kind and here.kind:
            state.agree(key, there, here)
            return
        if not there.kind and not here.kind and here.size == there.size and self._holds(here.path, there):
            state.agree(key, there, here)
            return
        path = self._conflict_name(here.path)
        try:
            self.folder.rename(here.path, path)
        except OSError as error:
            self._complain(here.path, error)
            return
        self.tally.conflicts += 1                # the next round uploads it, and downloads theirs
        state.set("base", key, None)

    def _conflict_name(self, path: str) -> str:
        above, _, name = path.rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        if not stem or len(suffix) > 16:
            stem, dot, suffix = name, "", ""
        mark = " (conflict %s %s)" % (self.state.words.get("device", "here"), time.strftime("%Y-%m-%d %H.%M"))
        for count in itertools.count(1):
            ending = mark + (" %d" % count if count > 1 else "") + dot + suffix
            found = (above + "/" if above else "") + cut_text(stem, NAME_LIMIT - len(ending.encode())) + ending
            if not os.path.lexists(self.folder.place(found)):
                return found
        raise AssertionError

    def _make_directories(self, plan: Plan) -> None:
        for key in plan.of("download"):
            there = self.state.there[key]
            if there.kind:
                try:
                    self.state.agree(key, there, self.folder.make_directory(there.path))
                except OSError as error:
                    self._complain(there.path, error)
        keys = [key for key in plan.of("upload") if self.scan.here[key].kind]
        for some in pieces(keys, COMMIT_FILES):
            outcomes = self._commit([{"mkdir": self.scan.here[key].path} for key in some], b"")
            for key, outcome in zip(some, outcomes):
                here = self.scan.here[key]
                if self._went_well(here.path, outcome):
                    self.state.agree(key, There(here.path, outcome["node"], COLLECTION, "", 0, 0, "", ""), here)

    # ---- the lanes: requests are under way while the next is prepared; what they do is independent of each other

    def _fly(self, work: Callable[[], Any], land: Callable[[Any], None]) -> None:
        self.flying.append((self.lane.submit(work), land))
        while len(self.flying) > LANES:
            self._land()

    def _land(self) -> None:
        future, land = self.flying.popleft()
        land(future.result())

    def _land_all(self) -> None:
        while self.flying:
            self._land()
        self._advance()

    def _advance(self) -> None:
        """All our commits are answered: if nobody else did anything meanwhile, we need not be told of our own doing."""
        if self.seen and None not in self.seen:
            self.state.say(cursor=max(self.state.cursor, *self.seen))
        self.seen = []

    def _remember(self, *, now: bool = False) -> None:
        """Write down what is agreed on, once a second; what was downloaded is on the medium first (invariant 4)."""
        if now or time.monotonic() - self.remembered > 1:
            if self.unsynced:
                self.folder.sync()
            self.unsynced = False
            self.state.flush()
            self.remembered = time.monotonic()

    def _commit(self, steps: list[dict[str, Any]], frames: bytes) -> list[dict[str, Any]]:
        """The outcomes of a commit."""
        if not steps:
            return []
        state = self.state
        head = {"op": secrets.token_hex(16), "server": state.words["server"], "since": state.cursor, "ops": steps}
        answer = self.link.call("POST", "/api/v1/commit", format_json(head) + b"\n" + frames)
        self.seen.append(answer.get("cursor"))
        return answer["results"]

    def _went_well(self, path: str, outcome: dict[str, Any]) -> bool:
        problem = outcome.get("problem")
        if problem is None:
            return True
        if problem["code"] == "held":
            self.held = True
        elif problem["code"] not in ("precondition-failed", "missing", "not-found"):     # those the next round sees
            self._complain(path, problem["detail"])
        return False

    # ---- up

    def _upload(self, keys: list[str]) -> None:
        """Small files by thousands in one commit; of large ones only the chunks the server lacks."""
        batch = Outgoing()
        for key in keys:
            here = self.scan.here[key]
            try:
                with self.folder.read(here.path) as file:
                    if here.size > CHUNK_SIZE:
                        chunks = self._send_ahead(file)
                    else:
                        data = file.read(CHUNK_SIZE + 1)
                        chunks = [(hashlib.sha256(data).hexdigest(), len(data))] if data else []
                        batch.chunks.update((hash, data) for hash, _ in chunks)
                        batch.bytes += len(data)
                    about = os.fstat(file.fileno())
            except OSError as error:
                self._complain(here.path, error)
                continue
            if (about.st_size, about.st_mtime_ns) != (here.size, here.mtime_ns) or sum(size for _, size in chunks) != here.size:
                self.unsettled.add(here.path)    # somebody writes to it: in the next round
                continue
            self._offer(batch, key, here, chunks)
            if len(batch.steps) >= COMMIT_FILES or batch.bytes >= COMMIT_BYTES:
                self._fly(partial(self._deliver, batch), partial(self._delivered, batch))
                batch = Outgoing()
        self._fly(partial(self._deliver, batch), partial(self._delivered, batch))
        self._land_all()

    def _offer(self, batch: Outgoing, key: str, here: Here, chunks: list[tuple[str, int]]) -> None:
        base, there = self.state.base.get(key), self.state.there.get(key)
        content, at = manifest_of(chunks) if chunks else EMPTY, min(max(here.mtime_ns // 1_000_000, MTIME_MIN), MTIME_MAX)
        if base and there and content == base.content and state_there(base, there) == "same":
            self.state.agree(key, there, here)   # only its time was changed
            return
        batch.steps.append({"put": here.path, "chunks": chunks, "mtime": at,
                            "if": base.etag if base and state_there(base, there) == "same" else None})
        batch.items.append((key, here, There(here.path, "", FILE, "", here.size, at, content,
                                             json.dumps(chunks) if len(chunks) > 1 else "")))

    def _send_ahead(self, file: BinaryIO) -> list[tuple[str, int]]:
        """Cut a large file and send what the server lacks; returns its chunks."""
        chunks, window, waiting = [], {}, 0
        for data in cut_by_content(file):
            hash = hashlib.sha256(data).hexdigest()
            chunks.append((hash, len(data)))
            window[hash] = data
            waiting += len(data)
            if waiting > WINDOW:
                self._fly(partial(self._send_missing, window), lambda done: None)
                window, waiting = {}, 0
        self._fly(partial(self._send_missing, window), lambda done: None)
        self._land_all()
        return chunks

    def _missing(self, hashes: Sequence[str]) -> list[str]:
        return self.link.call("POST", "/api/v1/chunks/missing", format_json({"hashes": list(hashes)}))["missing"] if hashes else []

    def _send_missing(self, window: dict[str, bytes]) -> None:
        frames = b"".join(format_frame(window[hash]) for hash in self._missing(list(window)))
        if frames:
            self.link.call("POST", "/api/v1/chunks", frames)
        if self.progress:
            self.progress.add(sum(map(len, window.values())))

    def _deliver(self, batch: Outgoing) -> list[dict[str, Any]]:
        """Commit files together with their chunks; what is not quite small is asked for first."""
        large = [hash for hash, data in batch.chunks.items() if len(data) > INLINE_LIMIT]
        lacking = set(self._missing(large))
        frames = b"".join(format_frame(data) for hash, data in batch.chunks.items() if len(data) <= INLINE_LIMIT or hash in lacking)
        return self._commit(batch.steps, frames)

    def _delivered(self, batch: Outgoing, outcomes: list[dict[str, Any]]) -> None:
        for (key, here, there), outcome in zip(batch.items, outcomes):
            if self._went_well(here.path, outcome):
                self.state.agree(key, there._replace(node=outcome["node"], etag=outcome["etag"]), here)
                self.tally.uploaded += 1
                if self.progress and here.size <= CHUNK_SIZE:
                    self.progress.add(here.size)
        self._remember()

    # ---- down

    def _download(self, keys: list[str]) -> None:
        """Small files by thousands in one request; of large ones only the chunks that are not here."""
        group, waiting = [], 0
        for key in keys:
            there, base = self.state.there[key], self.state.base.get(key)
            here = self.scan.here.get(key)
            if base and here and base.content == there.content and state_here(base, here) == "same":
                self.state.agree(key, there, here)       # the same bytes, written once more
            elif there.chunks:
                self._download_large(key, there)
            else:
                group.append(key)
                waiting += there.size
            if len(group) >= COMMIT_FILES or waiting >= COMMIT_BYTES:
                self._fetch_group(group)
                group, waiting = [], 0
        self._fetch_group(group)
        self._land_all()

    def _fetch_group(self, keys: list[str]) -> None:
        hashes = list(dict.fromkeys(hash for key in keys for hash, _ in chunks_of(self.state.there[key])))
        self._fly(partial(self._get, hashes), partial(self._place_group, keys))

    def _get(self, hashes: Sequence[str]) -> dict[str, bytes]:
        """Chunks by their hashes, checked; what cannot be had is not in it."""
        found: dict[str, bytes] = {}
        try:
            for some in pieces(hashes, OPS_LIMIT):
                with self.link.open("POST", "/api/v1/chunks/get", format_json({"hashes": some})) as response:
                    for hash in some:
                        size = int.from_bytes(response.read(4), "big")
                        data = response.read(size)
                        self.link.received += size + 4
                        if hashlib.sha256(data).hexdigest() != hash:
                            raise Stopped("what arrived is not what was asked for; nothing was touched")
                        found[hash] = data
                    response.read()
        except CloudError as error:
            if error.kind != "missing":
                raise                            # else it was replaced just now: the next round sees it
        except (OSError, http.client.HTTPException) as error:
            raise Stopped("the answer of the server broke off") from error
        return found

    def _place_group(self, keys: list[str], datas: dict[str, bytes]) -> None:
        placed = []
        for key in keys:
            there = self.state.there[key]
            if all(hash in datas for hash, _ in chunks_of(there)):
                try:
                    file = self.folder.temporary()
                    with file:
                        for hash, _ in chunks_of(there):
                            file.write(datas[hash])
                        here = self.folder.settle(file, there.path, there.mtime, self.scan.here.get(key))
                    placed.append((key, there, here))
                except OSError as error:
                    self._complain(there.path, error)
        self._note_placed(placed)

    def _note_placed(self, placed: list[tuple[str, There, Here | None]]) -> None:
        """Remember files that are in their places."""
        self.unsynced |= bool(placed)
        for key, there, here in placed:
            if here is None:
                self.unsettled.add(there.path)   # somebody was faster: in the next round
                continue
            self.state.agree(key, there, here)
            self.tally.downloaded += 1
            if self.progress:
                self.progress.add(there.size)
        self._remember()

    def _download_large(self, key: str, there: There) -> None:
        """Build a file from chunks of its old self, of what an earlier run fetched, and of the server."""
        self._land_all()
        chunks, here = chunks_of(there), self.scan.here.get(key)
        try:
            with self.folder.temporary("part-" + there.content[:32]) as file, self._old_self(key) as (old, places):
                start = self._verified_part(file, chunks)
                window, waiting = [], 0
                for hash, size in chunks[start:]:
                    window.append((hash, size))
                    waiting += size
                    if waiting > WINDOW:
                        self._build(file, window, old, places)
                        window, waiting = [], 0
                self._build(file, window, old, places)
                placed = self.folder.settle(file, there.path, there.mtime, here)
            self._note_placed([(key, there, placed)])
        except OSError as error:
            self._complain(there.path, error)
        except KeyError:
            self.unsettled.add(there.path)       # a chunk is gone: the file was replaced just now

    @contextmanager
    def _old_self(self, key: str) -> Iterator[tuple[BinaryIO, dict[str, tuple[int, int]]]]:
        """The file as it is here, and where its chunks are: {hash: (offset, bytes)}."""
        base, here, places, offset = self.state.base.get(key), self.scan.here.get(key), {}, 0
        if not base or not here or state_here(base, here) != "same":
            yield io.BytesIO(), {}
            return
        for hash, size in chunks_of(base):
            places[hash] = offset, size
            offset += size
        with self.folder.read(here.path) as file:
            yield file, places

    def _verified_part(self, file: BinaryIO, chunks: list[tuple[str, int]]) -> int:
        """How many chunks an earlier run left; the file ends after them."""
        file.seek(0)
        offset = 0
        for number, (hash, size) in enumerate(chunks):
            if hashlib.sha256(file.read(size)).hexdigest() != hash:
                file.truncate(offset)
                return number
            offset += size
        file.truncate(offset)
        return len(chunks)

    def _build(self, file: BinaryIO, window: list[tuple[str, int]], old: BinaryIO, places: dict[str, tuple[int, int]]) -> None:
        datas = {}
        for hash, _ in window:
            if hash in places:
                old.seek(places[hash][0])
                data = old.read(places[hash][1])
                if hashlib.sha256(data).hexdigest() == hash:
                    datas[hash] = data
        datas.update(self._get([hash for hash in dict(window) if hash not in datas]))
        for hash, _ in window:
            file.write(datas[hash])

    # ---- deletions, last

    def _delete_here(self, keys: list[str]) -> None:
        for key in reversed(keys):
            base, seen = self.state.base[key], self.scan.here[key]
            here = self.folder.look(seen.path)
            try:
                if here and not here.kind and state_here(base, here) != "same" and not (
                        here.size == base.size and self._holds(seen.path, base)):
                    continue                     # it has changed since: the next round sees that (invariant 2)
                if here and not self.folder.remove(seen.path, here.kind, self.leaves_out):
                    self.kept[seen.path] = "stays, for it holds files that are left out"
                    continue
            except OSError as error:
                self._complain(seen.path, error)
                continue
            self.state.set("base", key, None)
            self.tally.deleted_here += 1 - base.kind

    def _delete_there(self, keys: list[str]) -> None:
        steps, counts, last = [], [], None
        for key in keys:
            if last is not None and key.startswith(last + "/"):
                continue                         # it goes with what holds it
            base = self.state.base[key]
            if base.kind:
                last = key
            steps.append((key, {"delete": base.path, **({"since": self.state.cursor} if base.kind else {"if": base.etag})}))
            counts.append(sum(not self.state.base[other].kind for other in self.state.below("base", key)) if base.kind else 1)
        for some in pieces(list(zip(steps, counts)), COMMIT_FILES):
            outcomes = self._commit([step for (_, step), _ in some], b"")
            for ((key, step), count), outcome in zip(some, outcomes):
                if self._went_well(step["delete"], outcome):
                    self.state.forget(key)
                    self.tally.deleted_there += count

    # ---- on and on

    def watch(self, ended: threading.Event, tell: Callable[[SyncClient], None], listener: Link) -> None:
        """Run whenever either side changes, until `ended` is set.  raises Stopped by the brake"""
        news, pause = threading.Event(), 1.0
        threading.Thread(target=self._listen, args=(listener, news, ended), daemon=True).start()
        while not ended.is_set():
            news.clear()
            try:
                self.run()
                tell(self)
                pause = 1.0
            except Stopped as stopped:
                if stopped.code != 1:
                    raise
                log.warning("%s", stopped)       # the server is away: later
                ended.wait(pause)
                pause = min(60.0, 2 * pause)
                continue
            seen = self.scan
            wait = min(max(SCAN_LEAST, 20 * seen.seconds), SCAN_MOST)
            while not ended.is_set() and not news.wait(wait):
                if self.unsettled or self.folder.scan(self.folder.ignored())[:2] != seen[:2]:
                    break

    def _listen(self, link: Link, news: threading.Event, ended: threading.Event) -> None:
        """Long-poll the server; what it says is only that there is something to ask for."""
        while not ended.is_set():
            cursor = self.state.cursor
            if cursor < 0:                       # the first run is under way
                ended.wait(0.2)
                continue
            try:
                answer = link.call("GET", "/api/v1/changes?since=%d&wait=30&limit=1&server=%s" % (cursor, self.state.words["server"]))
                if answer["changes"] and answer["seq"] > self.state.cursor:
                    news.set()
                    ended.wait(0.2)
            except (Stopped, CloudError, ValueError):
                news.set()
                ended.wait(2)


class Outgoing:
    """Files of one commit: its steps, the chunks they need, and (key, as it is here, as it will be there) of each."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.chunks: dict[str, bytes] = {}
        self.items: list[tuple[str, Here, There]] = []
        self.bytes = 0


# ---- making a folder and an account known to each other

def open_client(place: Path, url: str | None, *, password: Callable[[str], str], device: str = "", yes: bool = False,
                only: Sequence[str] = (), show: bool = False) -> tuple[SyncClient, Link]:
    """The client of a folder, and a second connection for listening; asks for the password when they first meet.

    raises  Stopped
    """
    folder, known = LocalFolder(place.resolve()), folder_record(place)
    if not (folder.home / "state.db").exists():
        if known.exists() and not yes:
            raise Stopped("%s was synced before, and what it remembers is gone: is a disk not mounted? "
                          "With --yes it is merged anew" % place, 3)
        if not url:
            raise Stopped("which server?  sync DIR https://ann@cloud.example", 2)
        folder.root.mkdir(parents=True, exist_ok=True)
    folder.open()
    lock = FileLock(folder.home / "lock")
    if not lock.acquire(wait=False):
        raise Stopped("another process syncs this folder")
    state = SyncState(folder.home / "state.db")
    if "token" not in state.words:
        introduce(state, url or "", device or socket.gethostname(), password)
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text("%s\n%s\n" % (folder.root, state.words["url"]), encoding="utf-8")
    elif url and plain_url(url)[0] != state.words["url"]:
        raise Stopped("this folder belongs to %s" % state.words["url"], 2)
    links = [Link(state.words["url"], "Bearer " + state.words["token"], AGENT) for _ in range(2)]
    client = SyncClient(folder, state, links[0], only=only, yes=yes, show=show)
    client.lock = lock
    return client, links[1]


AGENT = "cloudserver-sync/" + __version__


def folder_record(place: Path) -> Path:
    """Where the user's home remembers that a folder is synced: told apart from an empty mount point by that."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "cloudserver" / hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:24]


def plain_url(url: str) -> tuple[str, str]:
    """(the address without a name, the name)."""
    parts = urlsplit(url if "://" in url else "https://" + url)
    host = parts.netloc.rpartition("@")[2]
    return "%s://%s%s" % (parts.scheme, host, parts.path.rstrip("/")), unquote_to_bytes(parts.username or "").decode("utf-8", "replace")


def introduce(state: SyncState, url: str, device: str, password: Callable[[str], str]) -> None:
    """Get a token of our own for the account, and forget the password."""
    address, name = plain_url(url)
    name = name or getpass.getuser()
    secret = base64.b64encode(("%s:%s" % (name, password(name))).encode()).decode()
    link = Link(address, "Basic " + secret, AGENT)
    try:
        answer = link.call("POST", "/api/v1/devices", format_json({"name": device}), tries=2)
    except CloudError as error:
        raise Stopped(str(error)) from error
    finally:
        link.close()
    state.say(url=address, token=answer["token"], account=name, device=device)
    state.flush()


# ==== 16. Command line ===================================================================

Arguments = argparse.Namespace
GROUPS = {"user": "make, list, change and remove accounts"}


class Command(NamedTuple):
    """A row of COMMANDS."""
    run: Callable[[Config, Arguments], Optional[int]]
    arguments: tuple[tuple[Any, ...], ...]       # of add_argument: ("name", {"help": ...})
    settings: tuple[str, ...]                    # fields of Config that mean something to it
    outside: bool                                # works on places that root alone may reach; others do as the data's owner


COMMANDS: dict[str, Command] = {}


def command(name: str, *arguments: tuple[Any, ...], settings: Iterable[str] = ("data",), outside: bool = False
            ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in COMMANDS."""
    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[name] = Command(run, arguments, tuple(settings), outside)
        return run
    return enter


def leave(code: int) -> None:
    """End the process without waiting for threads whose clients did not finish in time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def open_cloud(config: Config, how: str = "open") -> Iterator[Cloud]:
    """The cloud in the data directory, for a command that works beside a running server or without one.

    how   as of Cloud; "look": to read it, and note damage where that can be noted
    """
    check_upgrade(config.data)
    try:
        cloud = Cloud(config, how="open" if how == "look" else how)
    except (CloudError, OSError) as error:
        if how != "look" or getattr(error, "kind", "") in ("not-found", "conflict"):
            raise
        cloud = Cloud(config, how="read")        # a snapshot, a disk that turned read-only, or not a byte free
    try:
        yield cloud
    finally:
        cloud.close()


def check_upgrade(data: Path) -> None:
    """raises CloudError if a server of an older version runs on the data: its tables must not change under it"""
    with suppress(sqlite3.Error), closing(sqlite3.connect((data / "cloud.db").resolve().as_uri() + "?mode=ro", uri=True)) as db:
        if not 0 < db.execute("PRAGMA user_version").fetchone()[0] <= len(MIGRATIONS):
            return
        with closing(FileLock(data / "serve.lock")) as lock:
            if not lock.acquire(wait=False):
                raise CloudError("conflict", "a server of an older version runs on %s; restart it first" % data)


PASSWORD_STDIN = ("--password-stdin", {"action": "store_true", "help": "read the password from standard input"})


@command("serve", settings=[setting.name for setting in fields(Config)], outside=True)
def run_serve(config: Config, given: Arguments) -> None:
    """serve files until stopped (this is what happens without a command)"""
    leave(serve(config))


@command("user add", ("name", {"help": "what they log in by"}),
         ("--admin", {"action": "store_true", "help": "may manage accounts"}), PASSWORD_STDIN, settings=("data", "quota"))
def run_user_add(config: Config, given: Arguments) -> None:
    """make an account; --quota limits it"""
    with open_cloud(config, "make") as cloud:
        cloud.accounts.add(given.name, read_password(given), admin=given.admin,
                           quota=parse_size(config.quota) if config.quota else cloud.policy().quota)


@command("user list")
def run_user_list(config: Config, given: Arguments) -> None:
    """list accounts, what they use and may use"""
    with open_cloud(config, "look") as cloud:
        for account in cloud.accounts.list():
            print("%-24s %-6s %10s of %-10s %8d files" % (
                account.name, "admin" if account.admin else "", format_size(account.used),
                "any" if account.quota is None else format_size(account.quota), account.files))


@command("user passwd", ("name", {"help": "whose password"}), PASSWORD_STDIN)
def run_user_passwd(config: Config, given: Arguments) -> None:
    """set a new password; ends every session and app password of the account"""
    with open_cloud(config) as cloud:
        cloud.accounts.get(given.name)
        cloud.accounts.set_password(given.name, read_password(given))


@command("user remove", ("name", {"help": "whose account"}), ("--yes", {"action": "store_true", "help": "do not ask"}))
def run_user_remove(config: Config, given: Arguments) -> Optional[int]:
    """end an account; its files go when history does"""
    with open_cloud(config) as cloud:
        account = cloud.accounts.get(given.name)
        if not given.yes and not agree("Remove %s and %d files?" % (account.name, account.files)):
            return 1
        cloud.accounts.remove(given.name)
    return None


@command("verify", ("--quick", {"action": "store_true", "help": "only that every part is there, not its bytes"}))
def run_verify(config: Config, given: Arguments) -> int:
    """read everything and name every file that is damaged"""
    with open_cloud(config, "look") as cloud:
        wrong = verify(cloud, given.quick)
        print("\n".join(wrong) or "all is well: %d chunks, seq %d" % (cloud.numbers()["chunks"], cloud.head()))
    return 1 if wrong else 0


@command("gc", ("--now", {"action": "store_true", "help": "empty every trash and give back at once what nothing needs any more"}),
         ("--yes", {"action": "store_true", "help": "do not ask"}), settings=("data", "keep_days", "history"))
def run_gc(config: Config, given: Arguments) -> int:
    """give back space now (a running server does so by itself, bit by bit)"""
    with open_cloud(config) as cloud:
        upkeep = Upkeep(cloud)
        if given.now and not given.yes and not agree("Give up for good what is in the trash of every account?"):
            return 1
        if not upkeep.hold():
            raise CloudError("busy", "a running server is at it; try again in %d minutes, or stop it" % (LEASE // MINUTE))
        try:
            for account in cloud.accounts.list() if given.now else ():
                print("%s: %d things given up" % (account.name, cloud.empty_trash(cloud.accounts.principal(account.name))))
            upkeep.expire()
            upkeep.mark_age()
            print("history: %d rows thinned, %d nodes removed" % (upkeep.thin(), upkeep.purge()))
            print("chunks: %(manifests)d manifests, %(condemned)d condemned, %(buried)d buried, %(deleted)d deleted"
                  % upkeep.sweep(at_once=given.now))
        finally:
            upkeep.release()
    return 0


def agree(question: str) -> bool:
    print(question + " [y/N] ", end="", flush=True)
    return read_line().lower() == "y"


@command("backup", ("to", {"metavar": "DIR", "type": Path, "help": "directory to bring up to date; only what it lacks is copied"}), outside=True)
def run_backup(config: Config, given: Arguments) -> int:
    """copy everything to a directory, while the server runs"""
    with open_cloud(config, "look") as cloud:
        count, size, damaged = back_up(cloud, given.to)
    print("backed up to %s: %d chunks, %s copied" % (given.to, count, format_size(size)), *damaged, sep="\n")
    return 1 if damaged else 0


@command("repair", ("source", {"metavar": "FROM", "type": Path, "help": "a backup, or plain files: an export, a sync folder"}),
         ("--yes", {"action": "store_true", "help": "do it; without this only the plan is shown"}))
def run_repair(config: Config, given: Arguments) -> int:
    """bring damaged and missing parts of files back from a backup or from plain files"""
    if not given.source.is_dir():
        raise CloudError("not-found", "%s is not a directory" % given.source)
    with open_cloud(config, "open" if given.yes else "look") as cloud:
        healings = find_healing(cloud, given.source)
        known, lost = ({one.hash: one.wrong for one in healings if bool(one.source) == there} for there in (True, False))
        print("%d parts are damaged or missing; %s has %d of them" % (len(healings), given.source, len(known)))
        print(*("would heal " * (not given.yes) + line for line in name_damage(cloud, known)),
              *("no help for " + line for line in name_damage(cloud, lost)), sep="\n")
        if given.yes:
            print("%d parts are whole again" % heal(cloud, healings))
        elif known:
            print("nothing was changed; --yes does it")
    return 1 if lost or known and not given.yes else 0


@command("restore", ("source", {"metavar": "FROM", "type": Path, "help": "directory that backup wrote"}), outside=True)
def run_restore(config: Config, given: Arguments) -> int:
    """make a new data directory from a backup, and verify it"""
    wrong = restore_backup(given.source, config)
    print("\n".join(wrong) or "restored to %s; all is well" % config.data)
    return 1 if wrong else 0


@command("restored")
def run_restored(config: Config, given: Arguments) -> None:
    """tell every client that an older state of the data was put back (a snapshot, a copy), so that none deletes what it lacks"""
    with open_cloud(config) as cloud:
        begin_anew(cloud)
    print("Clients of %s know from now on that it may lack what they have seen.\n"
          "Native sync clients stop; `sync DIR --once --yes` merges. Nextcloud clients keep and send again what is missing."
          % config.data)


ONE_USER = ("--user", {"default": "", "help": "whose files; all, each in a folder of its own, if not given"})


@command("export", ("to", {"metavar": "DIR", "type": Path, "help": "where to write"}), ONE_USER, outside=True)
def run_export(config: Config, given: Arguments) -> int:
    """write the files as plain files, with their times"""
    code = 0
    with open_cloud(config, "look") as cloud:
        for name in [given.user] if given.user else [account.name for account in cloud.accounts.list()]:
            who = cloud.accounts.principal(name)
            written, failed = export_files(cloud, who, given.to, () if given.user else (name,))
            print("%s: %d files written" % (name, written), *failed, sep="\n")
            code |= bool(failed)
    return code


@command("import", ("source", {"metavar": "DIR", "type": Path, "help": "what to store"}),
         ("--user", {"required": True, "help": "whose it becomes"}), ("--into", {"default": "", "help": "collection to put it in"}),
         outside=True)
def run_import(config: Config, given: Arguments) -> int:
    """store a directory of plain files, with their times"""
    if not given.source.is_dir():
        raise CloudError("not-found", "%s is not a directory" % given.source)
    with open_cloud(config) as cloud:
        stored, skipped = import_files(cloud, cloud.accounts.principal(given.user), given.source, split_path(given.into))
    print("%d files stored" % stored, *skipped, sep="\n")
    return 1 if skipped else 0


@command("sync", ("folder", {"metavar": "DIR", "type": Path, "help": "the folder on this computer"}),
         ("url", {"metavar": "URL", "nargs": "?", "help": "the server, as https://ann@cloud.example; needed once"}),
         ("--once", {"action": "store_true", "help": "end when both sides are alike"}),
         ("--only", {"action": "append", "default": [], "metavar": "PATH", "help": "sync this part only; may be given again"}),
         ("--yes", {"action": "store_true", "help": "go on where the brake would stop"}),
         ("--device", {"default": "", "metavar": "NAME", "help": "what this computer is called"}),
         PASSWORD_STDIN,
         ("--json", {"action": "store_true", "help": "tell what was done as JSON"}),
         ("--status", {"action": "store_true", "help": "tell how things stand, and end"}), settings=(), outside=True)
def run_sync(config: Config, given: Arguments) -> int:
    """keep a folder and an account alike, both ways, until stopped"""
    try:
        if given.status:
            return tell_status(given)
        client, listener = open_client(given.folder, given.url, password=partial(ask_password, given), device=given.device,
                                       yes=given.yes, only=given.only, show=sys.stderr.isatty() and not given.json)
        if given.once:
            client.run()
            tell_tally(given, client)
            client.state.close()
            return 1 if client.problems else 0
        ended = threading.Event()
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: ended.set())
        client.watch(ended, partial(tell_tally, given), listener)
        client.state.close()
    except Stopped as stopped:
        return complain(stopped, stopped.code)
    return 0


def ask_password(given: Arguments, name: str) -> str:
    found = os.environ.get("CLOUDSERVER_PASSWORD")
    if found is None and (given.password_stdin or not sys.stdin.isatty()):
        found = read_line()
    return getpass.getpass("Password for %s: " % name) if found is None else found


def tell_tally(given: Arguments, client: SyncClient) -> None:
    """What a run did: a line, or JSON; what it could not do: a line each."""
    tally = {setting.name: getattr(client.tally, setting.name) for setting in fields(Tally)}
    notes = [*client.problems.values(), *("%s: %s" % item for item in client.kept.items()),
             *("%s: %s" % (key, reason) for key, reason in client.scan.blocked.items() if reason == NOT_A_FILE)]
    if given.json:
        print(json.dumps({**tally, "problems": sorted(client.problems.values())}), flush=True)
        return
    if given.once or client.tally.work():
        print("%(uploaded)d up, %(downloaded)d down, %(moved)d moved, %(deleted_here)d deleted here, %(deleted_there)d there, "
              "%(conflicts)d conflicts, %(skipped)d skipped, %(seconds).2f s" % tally, flush=True)
        print("".join(note + "\n" for note in notes), end="", file=sys.stderr, flush=True)


def tell_status(given: Arguments) -> int:
    """How a folder stands, without asking the server."""
    folder = LocalFolder(given.folder.resolve())
    if not (folder.home / "state.db").exists():
        raise Stopped("%s is not synced with anything" % given.folder)
    state = SyncState(folder.home / "state.db")
    scan = folder.scan(folder.ignored())
    changed = [key for key in {*state.base, *scan.here} if state_here(state.base.get(key), scan.here.get(key)) != "same"]
    about = {"server": state.words["url"], "account": state.words["account"], "device": state.words["device"],
             "files": sum(not base.kind for base in state.base.values()), "seq": state.cursor, "changed_here": len(changed)}
    print(json.dumps(about) if given.json else "\n".join("%-14s%s" % item for item in about.items()))
    return 0


@command("doctor", ("--alive", {"action": "store_true", "help": "only ask the running server whether it is well"}),
         settings=("data", "low_water", "tls_cert", "tls_key"))
def run_doctor(config: Config, given: Arguments) -> int:
    """look for what is known to go wrong"""
    if not (config.data / "cloud.db").exists():
        raise CloudError("not-found", "%s holds no cloud" % config.data)
    code = 0
    for well, sentence in examine_server(config) if given.alive else examine(config):
        print("%s  %s" % ({True: "ok  ", False: "LOOK", None: "-   "}[well], sentence))
        code |= well is False
    return code


def read_password(given: Arguments) -> str:
    if given.password_stdin or not sys.stdin.isatty():
        return read_line()
    password = getpass.getpass("Password for %s: " % given.name)
    if getpass.getpass("Again: ") != password:
        raise CloudError("bad-request", "the two are not the same")
    return password


# ---- words in and out

def prepare_streams() -> None:
    """Give each standard stream a place, and none a character it must fail at.

    Under pythonw, a task scheduler or `>&-` they are None, and the numbers 0 to 2 are free: a file opened next would get
    one, and with it whatever is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")        # cp1252, ascii: a name is shown, if not nicely


def read_line() -> str:
    """A line of standard input, as its sender meant it.  raises CloudError"""
    line = getattr(sys.stdin, "buffer", sys.stdin).readline()
    return line.rstrip("\r\n") if isinstance(line, str) else decode_line(line)


def decode_line(line: bytes) -> str:
    """UTF-8, or else what the console or locale speaks; without a byte order mark.  raises CloudError

    The same text must come in alike from every shell: it is hashed.
    """
    line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
    for encoding in ("utf-8", "oem" if os.name == "nt" else locale.getpreferredencoding(False)):
        with suppress(UnicodeDecodeError):
            if b"\0" not in line:
                return line.rstrip(b"\r\n").decode(encoding)
    raise CloudError("bad-request", "standard input is not text in UTF-8")


EXAMPLES = """examples:
  python3 cloudserver.py                                   serve on this computer, data in ./cloud-data
  python3 cloudserver.py --data /srv/cloud --port 8766     the flags of serve need no word before them
  python3 cloudserver.py user add bob --quota 50G
  python3 cloudserver.py sync ~/Cloud https://ann@cloud.example
  python3 cloudserver.py backup /mnt/disk/cloud

Each command has its own --help; every flag is also an environment variable, as CLOUDSERVER_PORT."""


class HelpFormatter(argparse.HelpFormatter):
    """Shows those defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says = action.default not in (None, "", [], False, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if says else "")


def build_parser() -> argparse.ArgumentParser:
    """The command line, from COMMANDS and the fields of Config.  raises CloudError for a variable that says nothing"""
    parser = argparse.ArgumentParser(prog="cloudserver.py", description="A personal cloud in one file.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version="cloudserver " + __version__)
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    known = {setting.name: setting for setting in fields(Config)}
    for name, row in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = inner.add_subparsers(metavar="COMMAND", required=True)
        sub = groups[group].add_parser(last, help=row.run.__doc__, description=row.run.__doc__, formatter_class=HelpFormatter)
        sub.set_defaults(command=row)
        for *flags, how in row.arguments:
            sub.add_argument(*flags, **how)
        for setting in row.settings:
            add_setting(sub, known[setting])
    return parser


SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def add_setting(parser: argparse.ArgumentParser, setting: Any) -> None:
    """A field of Config as a flag, whose default the environment can change; an empty variable is as good as none."""
    how, flag, variable = dict(setting.metadata), "--" + setting.name.replace("_", "-"), variable_of(setting)
    how["help"] = "%s [%s]" % (how["help"].replace("%", "%%"), variable)
    given = os.environ.get(variable) or setting.default
    if not isinstance(setting.default, bool):
        kind = int if isinstance(setting.default, int) else Path if "Path" in setting.type else str
        parser.add_argument(flag, type=kind, default=given, **how)
        return
    if str(given).lower() not in SWITCHES:
        raise CloudError("bad-request", "%s is one of %s" % (variable, ", ".join(SWITCHES)))
    parser.add_argument(flag, action="store_true", default=SWITCHES[str(given).lower()], **how)


def variable_of(setting: Any) -> str:
    return "CLOUDSERVER_" + setting.name.upper()


def check_environment() -> None:
    """raises CloudError for a variable that is no setting: a slip there must not pass for consent"""
    known = {"CLOUDSERVER_PASSWORD", *map(variable_of, fields(Config))}
    for name in sorted(os.environ):
        if name.startswith("CLOUDSERVER_") and name not in known:
            raise CloudError("bad-request", "%s is not a setting; `serve --help` shows those there are" % name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 usage."""
    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "serve")
    if words[0] != "sync":                       # what that writes are the user's own files
        os.umask(0o077)
    try:
        check_environment()
        given = build_parser().parse_args(words)
        config = Config(**{name: getattr(given, name) for name in given.command.settings})
        check_config(config)
    except CloudError as error:
        return complain(error, 2)
    try:
        if not given.command.outside:
            become_owner(config.data)
        return given.command.run(config, given) or 0
    except (CloudError, OSError, sqlite3.Error) as error:
        return complain(error, 1)
    except EOFError:                             # Ctrl-D, or nobody there
        return complain(CloudError("bad-request", "standard input has no answer"), 1)
    except KeyboardInterrupt:
        return 1


def check_config(config: Config) -> None:
    """raises CloudError for a setting that makes no sense"""
    for name in ("max_file", "low_water", "quota", "history"):
        if getattr(config, name):
            parse_size(getattr(config, name))
    try:
        Site(config)
    except ValueError as error:
        raise CloudError("bad-request", "--behind-proxy: %s" % error) from error
    if not 0 <= config.port <= 65535 or config.workers < 0 or not 0 <= config.keep_days <= KEEP_MOST or config.max_connections < 1:
        raise CloudError("bad-request", "--port, --workers, --keep-days or --max-connections is out of range")
    if config.windows_names not in ("allow", "refuse"):
        raise CloudError("bad-request", "--windows-names is allow or refuse")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise CloudError("bad-request", "--tls-cert and --tls-key go together")
    if bool(config.admin) != bool(config.admin_password_file):
        raise CloudError("bad-request", "--admin and --admin-password-file go together")


def complain(error: Exception, code: int) -> int:
    says = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        says = "%s: %s" % (error.filename, reason_of(error))
    print("cloudserver: %s" % says, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
