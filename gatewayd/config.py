"""Configuration: the only reader of the environment and of the user's files.

``$GATEWAYD_CONFIG``, else ``$XDG_CONFIG_HOME/gatewayd/config.toml``, else ``~/.config/gatewayd/config.toml``::

    default_profile = "work"
    start_on_connect = false                       # a connection does not start a stopped sandbox; default: it does
    keepalive_interval = 15                        # seconds between two checks of a link; read at the start, like the next
    keepalive_timeout = 10                         # seconds of silence after a check until the link is given up

    [profiles.work]
    endpoint = "https://langsmith.example.com"
    api_key_file = "~/.config/gatewayd/work.key"   # mode 0600; or api_key_env = "NAME"
    workspace_id = "…"                             # optional
    ca_file = "/etc/ssl/company.pem"               # optional, in addition to the system's certificates

    [ssh]                                          # ssh over TCP, for programs that cannot run a ProxyCommand; read at the start
    listen = "127.0.0.1:2222"
    authorized_keys = "~/.ssh/authorized_keys"     # this or the next, or both; like sshd's
    trusted_user_ca_keys = "/etc/ssh/user_ca.pub"
    profile = "work"                               # whose sandboxes; default: the default profile
    beyond_loopback = false                        # whether `listen` may name an address that others can reach
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import ssl
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from gatewayd import api
from gatewayd.errors import GatewayError, printable

DEFAULT_ENDPOINT = "https://api.smith.langchain.com"
FILE_MAX = 1 << 20  # bytes of a configuration file
KEY_MAX = 4096  # bytes of an API key file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a profile
KEYS = ("default_profile", "start_on_connect", "keepalive_interval", "keepalive_timeout", "profiles", "ssh")  # of the file itself
KEEPALIVE_MIN, KEEPALIVE_MAX = 0.1, 3600  # seconds
PROFILE_KEYS = frozenset({"endpoint", "api_key_file", "api_key_env", "workspace_id", "ca_file"})


def config_error(message: str, hint: str = "") -> GatewayError:
    """An error of kind ``config``."""
    return GatewayError(message, kind=api.ErrorKind.CONFIG, hint=hint)


@dataclass(frozen=True)
class Profile:
    """A sandbox service and how to be let in; hashable: equal profiles share connections."""

    name: str
    endpoint: str  # URL without a trailing slash
    api_key: str = field(default="", repr=False)
    workspace_id: str = ""
    ca_file: str = ""  # additional certificate authorities, PEM; "": the system's alone

    def headers(self) -> dict[str, str]:
        """What authenticates a request."""
        headers = {"X-Api-Key": self.api_key} if self.api_key else {}
        if self.workspace_id:
            headers["X-Tenant-Id"] = self.workspace_id
        return headers


@dataclass(frozen=True)
class Caller:
    """What one request says about the service it wants; empty strings where it says nothing."""

    profile: str = ""
    endpoint: str = ""
    api_key: str = field(default="", repr=False)
    workspace: str = ""


@dataclass(frozen=True)
class Proxies:
    """HTTP proxies, as the environment names them."""

    http: str = field(default="", repr=False)  # URLs may hold a password
    https: str = field(default="", repr=False)
    every: str = field(default="", repr=False)  # ALL_PROXY
    no_proxy: str = ""

    def for_url(self, url: str) -> str | None:
        """The proxy to reach `url` (http, https, ws or wss) through; None: directly. Loopback is always reached directly.

        Raises:
            GatewayError: kind config: the proxy is not an http or https one.
        """
        parts = urlsplit(url)
        proxy = (self.https if parts.scheme in ("https", "wss") else self.http) or self.every
        host = parts.hostname or ""
        if not proxy or is_loopback(host) or self._excepted(host):
            return None
        if "://" not in proxy:
            proxy = f"http://{proxy}"
        scheme = urlsplit(proxy).scheme.lower()
        if scheme not in ("http", "https"):
            raise config_error(
                f"cannot use a {scheme} proxy for {host}", "set HTTPS_PROXY to an http:// or https:// proxy, or NO_PROXY"
            )
        return proxy

    def _excepted(self, host: str) -> bool:
        """Whether NO_PROXY names `host`: ``*``, a domain (with all below it), an address or a network, separated by commas."""
        for entry in filter(None, (part.strip().lower() for part in self.no_proxy.split(","))):
            domain = entry.removeprefix("*").removeprefix(".").partition(":")[0]
            if entry == "*" or host == entry or (domain and (host == domain or host.endswith(f".{domain}"))):
                return True
            try:
                if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                continue
        return False


@dataclass(frozen=True)
class SshSettings:
    """The [ssh] table: ssh over TCP. ssh over connect.sock needs none of it."""

    host: str = ""  # address to listen on; "": do not listen
    port: int = 0
    authorized_keys: Path | None = None
    trusted_user_ca_keys: Path | None = None
    profile: str = ""  # "": the default one


@dataclass(frozen=True)
class Config:
    """Everything the daemon is told from outside."""

    runtime_dir: Path  # sockets and locks
    state_dir: Path  # logs, the embedded service's state
    config_file: Path  # need not exist
    default_profile: str = ""  # "": none named
    start_on_connect: bool = True  # whether a connection starts a stopped sandbox, where the request does not say
    keepalive_interval: float = 15.0  # seconds between two pings of a link to a sandbox
    keepalive_timeout: float = 10.0  # seconds without an answer, or anything else, after which a link is given up
    profiles: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # the tables of the file, checked
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # the daemon's environment when it started
    proxies: Proxies = field(default_factory=Proxies)
    ssh: SshSettings = field(default_factory=SshSettings)

    def resolve(self, caller: Caller) -> Profile | None:
        """The profile a request means; None: the embedded service.

        The named one; else the credentials that came along; else the default profile; else the daemon's environment; else local.

        Raises:
            GatewayError: kind config: no such profile, or its key cannot be had.
        """
        name = caller.profile
        if not name and caller.api_key:
            name = api.PROFILE_ENV
        if not name:
            name = self.default_profile or (api.PROFILE_ENV if self.environ.get("LANGSMITH_API_KEY") else api.PROFILE_LOCAL)
        if name == api.PROFILE_LOCAL:
            return None
        if name == api.PROFILE_ENV:
            return self._from_environment(caller)
        table = self.profiles.get(name)
        if table is None:
            known = ", ".join([api.PROFILE_LOCAL, api.PROFILE_ENV, *sorted(self.profiles)])
            raise config_error(
                f"cannot use profile {name!r}: {self.config_file} has no [profiles.{name}]", f"known profiles: {known}"
            )
        return self._from_table(name, table)

    def _from_environment(self, caller: Caller) -> Profile:
        env = self.environ
        if caller.api_key:
            key, endpoint, workspace = caller.api_key, caller.endpoint, caller.workspace
        else:
            key = env.get("LANGSMITH_API_KEY", "")
            endpoint, workspace = env.get("LANGSMITH_ENDPOINT", ""), env.get("LANGSMITH_WORKSPACE_ID", "")
        if not key:
            raise config_error(
                "cannot use profile 'env': LANGSMITH_API_KEY is not set", "export LANGSMITH_API_KEY, or use --profile local"
            )
        return Profile(
            api.PROFILE_ENV,
            endpoint=check_endpoint(endpoint or DEFAULT_ENDPOINT, "LANGSMITH_ENDPOINT"),
            api_key=check_key(key, "LANGSMITH_API_KEY"),
            workspace_id=check_header(workspace, "LANGSMITH_WORKSPACE_ID"),
        )

    def _from_table(self, name: str, table: Mapping[str, str]) -> Profile:
        where = f"{self.config_file}: profiles.{name}"
        if path := table.get("api_key_file"):
            key = read_key_file(self._path(path), f"{where}.api_key_file")
        elif variable := table.get("api_key_env"):
            key = self.environ.get(variable, "")
            if not key:
                raise config_error(
                    f"{where}.api_key_env: the daemon's environment has no {variable}",
                    f"export {variable} and restart the daemon (sandbox down; sandbox up), or use api_key_file",
                )
            key = check_key(key, f"{where}.api_key_env ({variable})")
        else:
            key = ""
        return Profile(
            name,
            endpoint=table["endpoint"],
            api_key=key,
            workspace_id=table.get("workspace_id", ""),
            ca_file=str(self._path(table["ca_file"])) if table.get("ca_file") else "",
        )

    def _path(self, text: str) -> Path:
        return _beside(self.config_file, text, self.environ)


class Settings:
    """The current `Config`: the file is read again when it has changed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        # A copy, with absolute paths: neither later changes of os.environ nor of the working directory count.
        self._environ = dict(environ)
        for name in ("GATEWAYD_CONFIG", "GATEWAYD_RUNTIME_DIR", "GATEWAYD_STATE_DIR"):
            if path := environ.get(name):
                self._environ[name] = str(Path(path).absolute())
        self._signature = _signature(config_path(self._environ))  # of the file that _config came from
        self._config = load(self._environ)  # the last good one

    def current(self) -> Config:
        """Raises GatewayError, kind config, when the file is wrong; the next call looks again."""
        signature = _signature(self._config.config_file)
        if signature != self._signature:
            self._config = load(self._environ)
            self._signature = signature
        return self._config


def load(environ: Mapping[str, str]) -> Config:
    """Read environment and file.

    Raises:
        GatewayError: kind config, naming the file and the key.
    """
    path = config_path(environ)
    table = _read_toml(path, required=bool(environ.get("GATEWAYD_CONFIG")))
    profiles: dict[str, Mapping[str, str]] = {}
    for key in table:
        if key not in KEYS:
            raise config_error(f"{path}: unknown key {key!r}", f"known keys: {', '.join(KEYS)}")
    tables = table.get("profiles", {})
    if not isinstance(tables, dict):
        raise config_error(f"{path}: profiles must be tables", "write [profiles.NAME]")
    for name, value in tables.items():
        profiles[name] = _check_profile(path, name, value)
    default = table.get("default_profile", "")
    if not isinstance(default, str):
        raise config_error(f"{path}: default_profile must be a string")
    if default and default not in profiles and default not in (api.PROFILE_LOCAL, api.PROFILE_ENV):
        raise config_error(
            f"{path}: default_profile {default!r} is not defined", f"add [profiles.{default}], or change default_profile"
        )
    start_on_connect = table.get("start_on_connect", True)
    if not isinstance(start_on_connect, bool):
        raise config_error(f"{path}: start_on_connect must be true or false")
    return Config(
        runtime_dir=Path(api.runtime_dir(environ)),
        state_dir=Path(api.state_dir(environ)),
        config_file=path,
        default_profile=default,
        start_on_connect=start_on_connect,
        keepalive_interval=_check_seconds(path, table, "keepalive_interval", Config.keepalive_interval),
        keepalive_timeout=_check_seconds(path, table, "keepalive_timeout", Config.keepalive_timeout),
        profiles=profiles,
        environ=dict(environ),
        proxies=Proxies(
            http=_either_case(environ, "http_proxy"),
            https=_either_case(environ, "https_proxy"),
            every=_either_case(environ, "all_proxy"),
            no_proxy=_either_case(environ, "no_proxy"),
        ),
        ssh=_check_ssh(path, table.get("ssh", {}), environ),
    )


def config_path(environ: Mapping[str, str]) -> Path:
    """Where the configuration file is, or would be."""
    if own := environ.get("GATEWAYD_CONFIG"):
        return Path(own).absolute()
    xdg = Path(environ.get("XDG_CONFIG_HOME", ""))
    if not xdg.is_absolute():  # the XDG specification: relative paths are to be ignored
        xdg = Path(environ.get("HOME") or Path.home()) / ".config"
    return xdg / "gatewayd" / "config.toml"


def _check_seconds(path: Path, table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not KEEPALIVE_MIN <= value <= KEEPALIVE_MAX:
        raise config_error(f"{path}: {key} must be a number of seconds, {KEEPALIVE_MIN} to {KEEPALIVE_MAX}")
    return float(value)


def _check_profile(path: Path, name: str, value: Any) -> Mapping[str, str]:
    where = f"{path}: profiles.{name}"
    if name in (api.PROFILE_LOCAL, api.PROFILE_ENV):
        raise config_error(f"{where}: {name!r} is built in", "choose another name")
    if not NAME.fullmatch(name):
        raise config_error(f"{where}: a profile's name is made of letters, digits, '_', '.' and '-', at most 64")
    if not isinstance(value, dict):
        raise config_error(f"{where} must be a table", f"write [profiles.{name}]")
    for key, text in value.items():
        if key not in PROFILE_KEYS:
            raise config_error(f"{where}: unknown key {key!r}", f"known keys: {', '.join(sorted(PROFILE_KEYS))}")
        if not isinstance(text, str):
            raise config_error(f"{where}.{key} must be a string")
    if not value.get("endpoint"):
        raise config_error(f"{where}.endpoint is missing", f'add endpoint = "{DEFAULT_ENDPOINT}"')
    if value.get("api_key_file") and value.get("api_key_env"):
        raise config_error(f"{where}: api_key_file and api_key_env exclude each other", "keep one of them")
    checked: dict[str, str] = dict(value)
    checked["endpoint"] = check_endpoint(value["endpoint"], f"{where}.endpoint")
    checked["workspace_id"] = check_header(value.get("workspace_id", ""), f"{where}.workspace_id")
    return checked


def _check_ssh(path: Path, table: Any, environ: Mapping[str, str]) -> SshSettings:
    where = f"{path}: ssh"
    kinds = {"listen": str, "authorized_keys": str, "trusted_user_ca_keys": str, "profile": str, "beyond_loopback": bool}
    if not isinstance(table, dict):
        raise config_error(f"{where} must be a table", "write [ssh]")
    for key, value in table.items():
        if key not in kinds:
            raise config_error(f"{where}: unknown key {key!r}", f"known keys: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise config_error(f"{where}.{key} must be {'true or false' if kinds[key] is bool else 'a string'}")
    files = {
        key: _beside(path, table[key], environ) if table.get(key) else None for key in ("authorized_keys", "trusted_user_ca_keys")
    }
    listen = table.get("listen", "")
    host, _, port = listen.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    if listen:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise config_error(
                f"{where}.listen: not an address and a port: {printable(listen, 100)!r}", "such as 127.0.0.1:2222"
            ) from None
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise config_error(f"{where}.listen: not a port: {printable(port, 20)!r}", "such as 127.0.0.1:2222")
        if not address.is_loopback and not table.get("beyond_loopback"):
            raise config_error(
                f"{where}.listen: others can reach {host}", "listen on 127.0.0.1, or say beyond_loopback = true if you mean it"
            )
        if not any(files.values()):
            raise config_error(f"{where}: nobody could log in", "name a file: authorized_keys or trusted_user_ca_keys")
    return SshSettings(host=host if listen else "", port=int(port) if listen else 0, profile=table.get("profile", ""), **files)


def _beside(file: Path, text: str, environ: Mapping[str, str]) -> Path:
    """A path of the file: ``~`` is the home, relative means beside the file."""
    home = environ.get("HOME", "")
    if home and (text == "~" or text.startswith("~/")):
        text = home + text[1:]
    return file.parent / text


def check_endpoint(url: str, where: str) -> str:
    """A service's URL without ``/api/v1`` or a slash at its end. Raises GatewayError (config)."""
    hint = f"use a URL such as {DEFAULT_ENDPOINT}"
    try:
        parts = urlsplit(url.strip())
        port_is_valid = parts.port != 0
    except ValueError:
        parts, port_is_valid = SplitResult("", "", "", "", ""), False
    if (
        not port_is_valid
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or not url.strip().isascii()
        or " " in url.strip()
    ):
        raise config_error(f"{where}: not an http or https URL: {printable(url, 200)!r}", hint)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise config_error(f"{where}: the URL must hold no user, password, query or fragment", hint)
    base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return base.removesuffix("/api/v1").rstrip("/")


def check_key(key: str, where: str) -> str:
    """An API key fit for a header; the message never repeats it. Raises GatewayError (config)."""
    key = key.strip()
    if not key:
        raise config_error(f"{where}: the API key is empty")
    if len(key) > KEY_MAX or not all("!" <= char <= "~" for char in key):
        raise config_error(f"{where}: an API key is one line of printable ASCII without spaces")
    return key


def check_header(value: str, where: str) -> str:
    """A value fit for a header, or "". Raises GatewayError (config)."""
    value = value.strip()
    if len(value) > 256 or not all("!" <= char <= "~" for char in value):
        raise config_error(f"{where}: printable ASCII without spaces is needed, at most 256 characters")
    return value


def read_key_file(path: Path, where: str) -> str:
    """The key in `path`, which must be the user's alone. Raises GatewayError (config)."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise config_error(f"{where}: {path} is not a regular file")
            if info.st_mode & 0o077:
                raise config_error(
                    f"{where}: {path} can be read by others (mode {info.st_mode & 0o777:04o})", f"chmod 600 {path}"
                )
            content = file.read(KEY_MAX + 1)
    except OSError as exc:
        raise config_error(
            f"{where}: cannot read {path}: {exc.strerror}", "create the file with the API key in it, mode 0600"
        ) from exc
    return check_key(content.decode("utf-8", "replace"), where)


@functools.lru_cache(maxsize=8)
def tls_context(ca_file: str) -> ssl.SSLContext:
    """The system's certificate authorities and those in `ca_file`. Raises GatewayError (config)."""
    context = ssl.create_default_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            reason = exc.strerror or "no certificate in it"
            raise config_error(f"cannot use ca_file {ca_file}: {reason}", "ca_file names a PEM file with certificates") from exc
    return context


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine by name or address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _either_case(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_MAX + 1)
    except FileNotFoundError as exc:
        if required:
            raise config_error(f"GATEWAYD_CONFIG: no such file: {path}", "create it, or unset GATEWAYD_CONFIG") from exc
        return {}
    except OSError as exc:
        raise config_error(f"cannot read {path}: {exc.strerror}") from exc
    if len(content) > FILE_MAX:
        raise config_error(f"{path} is larger than {FILE_MAX} bytes")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise config_error(f"{path} is not valid TOML: {printable(exc)}") from exc
