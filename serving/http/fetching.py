"""Pictures that a request names by address: fetched from allowed hosts alone, never from a private address by name.

The address that a host's name resolves to is checked and then connected to, so that no second resolution can lead
elsewhere; proxies of the environment are not used, for they would resolve it themselves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from serving.http.errors import ApiError

MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
INVALID = "invalid_image_url"
FAILED = "failed_to_download_image"


@dataclass(frozen=True)
class Target:
    """A checked address: where to connect to for a URL."""

    url: httpx.URL
    address: str


class Hosts:
    """The hosts of `serve.allowed_image_hosts`: `name`, for the scheme's own port, or `name:port`."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = {host.lower() for host in allowed}

    async def target(self, url: httpx.URL, param: str) -> Target:
        """Raises: ApiError where the host is not allowed, unknown, or has a private address."""
        port = url.port or PORTS.get(url.scheme)
        host = url.host.lower()
        bracketed = f"[{host}]" if ":" in host else host
        names = {f"{bracketed}:{port}"} | ({host, bracketed} if port == PORTS.get(url.scheme) else set())
        if url.scheme not in PORTS or not host or not names & self._allowed:
            shown = f"{url.scheme}://{bracketed}" if url.scheme in PORTS else f"{url.scheme or 'no'} scheme"
            allowed = ", ".join(sorted(self._allowed)) or "none"
            message = f"{param}: {shown}: not fetched from here; send a data URL (serve.allowed_image_hosts: {allowed})"
            raise ApiError(400, message, INVALID, param)
        address = await _resolve(host, port or 0, param)
        if host not in ("localhost", address) and not ipaddress.ip_address(address).is_global:
            message = f"{param}: {host} has the private address {address}; name the address in allowed_image_hosts"
            raise ApiError(400, message, INVALID, param)
        return Target(url, address)


async def _resolve(host: str, port: int, param: str) -> str:
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ApiError(400, f"{param}: {host}: {error}", FAILED, param) from None
    return str(addresses[0][4][0])


async def fetch(text: str, hosts: Hosts, max_bytes: int, seconds: float, param: str) -> bytes:
    """The file at an address.

    Raises: ApiError where it is not allowed, larger than `max_bytes`, or not here in time.
    """
    try:
        async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=None, trust_env=False) as client:
            target = await hosts.target(httpx.URL(text), param)
            for _ in range(MAX_REDIRECTS + 1):
                content, location = await _get(client, target, max_bytes, param)
                if location is None:
                    return content
                url = target.url.join(location)
                if url.host != target.url.host:
                    message = f"{param}: {target.url.host} redirects to another host, {url.host}; name the file itself"
                    raise ApiError(400, message, INVALID, param)
                target = await hosts.target(url, param)
    except httpx.InvalidURL as error:
        raise ApiError(400, f"{param}: not an address: {error}; send a data URL", INVALID, param) from None
    except (httpx.HTTPError, TimeoutError) as error:
        raise ApiError(400, f"{param}: not fetched: {error or 'its server is too slow'}", FAILED, param) from None
    raise ApiError(400, f"{param}: more than {MAX_REDIRECTS} redirects; name the file itself", FAILED, param)


async def _get(client: httpx.AsyncClient, target: Target, max_bytes: int, param: str) -> tuple[bytes, str | None]:
    """The file, or where it was moved to."""
    request = client.build_request(
        "GET",
        target.url.copy_with(host=target.address),
        headers={"Host": target.url.netloc.decode(), "Accept": "image/*, video/*", "Accept-Encoding": "identity"},
        extensions={"sni_hostname": target.url.raw_host.decode()},
    )
    response = await client.send(request, stream=True)
    try:
        if response.is_redirect:
            return b"", response.headers["location"]
        if response.status_code != 200:
            raise ApiError(400, f"{param}: not fetched: status {response.status_code}", FAILED, param)
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise ApiError(400, f"{param}: larger than {max_bytes} bytes; send less", "image_too_large", param)
        return bytes(content), None
    finally:
        await response.aclose()
