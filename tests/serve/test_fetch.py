"""Images behind addresses: fetched only where that is allowed, and only from the public internet.
Nothing here is sent to anywhere but this machine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import openai
import pytest

from mlx_diffgemma.cli.serve import ServedOptions
from mlx_diffgemma.config.serving import Limits
from mlx_diffgemma.serve import fetch
from mlx_diffgemma.serve.errors import ApiError
from mlx_diffgemma.serve.fetch import fetch_images, is_public
from tests.serve.cases import ask_chat, serving
from tests.serve.test_images import asked, data_url, picture

OPEN = Limits(allow_image_urls=True)
PICTURE = picture()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.paths.append((self.path, self.headers["Host"]))
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/slow":
            time.sleep(3)
        elif self.path == "/told":  # a large size, and never a byte of it
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            self.wfile.flush()
            time.sleep(3)
        elif self.path == "/pieces":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (PICTURE[:100], PICTURE[100:], b""):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        elif self.path in ("/a.png", "/a%20b.png?c=%C3%A4"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)
        else:
            self.send_error(404)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.paths = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def at(host, path: str = "/a.png") -> str:
    return f"http://127.0.0.1:{host.server_port}{path}"


def fetched(*urls: str, limits: Limits = OPEN) -> list[str]:
    """The images of a message, once they are there."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    asyncio.run(fetch_images([{"role": "user", "content": content}], limits, "messages"))
    return [part["image_url"]["url"] for part in content]


@contextmanager
def all_public(monkeypatch) -> Iterator[None]:
    """Take this machine for a part of the public internet."""
    with monkeypatch.context() as patched:
        patched.setattr(fetch, "is_public", lambda address: True)
        yield


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 127.8.9.1 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 "
    "100.64.0.1 224.0.0.1 255.255.255.255 240.0.0.1 192.0.2.1 198.18.0.1 :: ::1 fe80::1 fe80::1%1 "
    "fc00::1 fd12::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::7f00:1 2002:7f00:1::1 "
    "64:ff9b::7f00:1 2001:db8::1 2001:0:1::1 localhost".split(),
)
def test_other_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "2606:4700::1111"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{}/a.png",
        "http://localhost:{}/a.png",
        "http://2130706433:{}/a.png",
        "http://127.1:{}/a.png",
        "http://[::ffff:127.0.0.1]:{}/a.png",
        "http://[::1]:{}/a.png",
        "https://169.254.169.254/latest",
    ],
)
def test_this_machine_and_private_networks_are_never_asked(host, monkeypatch, url):
    connected = []
    monkeypatch.setattr(asyncio, "open_connection", lambda *_, **__: connected.append(1) or 1 / 0)
    with pytest.raises(ApiError, match=r"not on the public internet|no such host") as error:
        fetched(url.format(host.server_port))
    assert (error.value.status, error.value.param) == (400, "messages") and not connected


def test_a_host_with_one_private_address_is_not_asked(monkeypatch):
    async def found(self, name, port, **more):
        return [(2, 1, 6, "", ("8.8.8.8", port)), (2, 1, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", found)
    with pytest.raises(ApiError, match="not on the public internet"):
        fetched("http://images.example/a.png")


def test_a_name_is_looked_up_once(host, monkeypatch):
    """A second answer may lead elsewhere than to what was checked."""
    names = []

    async def found(self, name, port, **more):
        names.append(name)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", found)
    with all_public(monkeypatch):
        url = f"http://images.example:{host.server_port}/a.png"
        assert fetched(url) == [data_url(PICTURE, "")]
    assert names == ["images.example"]
    assert host.paths[-1] == ("/a.png", f"images.example:{host.server_port}")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://8.8.8.8/a.png",
        "ftp://8.8.8.8:80/a.png",
        "http:///a.png",
        "http://user:word@8.8.8.8/a.png",
        "http://8.8.8.8:99999/a.png",
        "http://[8.8.8.8/a.png",
        f"http://{'a' * 70}.example/a.png",
    ],
)
def test_what_is_no_plain_address_is_refused(url):
    with pytest.raises(ApiError, match=r"no http or https address|an address has a host"):
        fetched(url)


def test_an_image_is_fetched_as_it_is_and_once(host, monkeypatch):
    before = len(host.paths)
    with all_public(monkeypatch):
        odd = at(host, "/a b.png?c=ä")
        urls = fetched(at(host), data_url(b"x"), at(host), at(host, "/pieces"), odd)
    assert urls == [data_url(PICTURE, ""), data_url(b"x"), *[data_url(PICTURE, "")] * 3]
    assert len(host.paths) == before + 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nothing", "status 404"),
        ("/away", "status 302; redirects are not followed"),
        ("/slow", "did not arrive within 0.5 s"),
        ("/told", "larger than"),
    ],
)
def test_a_host_that_gives_no_image_is_an_error_of_the_request(host, monkeypatch, path, said):
    with all_public(monkeypatch), pytest.raises(ApiError, match=said):
        fetched(at(host, path), limits=Limits(allow_image_urls=True, body_seconds=0.5))


@pytest.mark.parametrize("paths", [["/a.png"], ["/pieces"], ["/a.png", "/pieces"]])
def test_all_images_together_are_bounded(host, monkeypatch, paths):
    most = len(PICTURE) * len(paths) - 1
    limits = Limits(allow_image_urls=True, max_body_mb=most / 1e6)
    with all_public(monkeypatch), pytest.raises(ApiError, match="larger than"):
        fetched(*(at(host, path) for path in paths), limits=limits)


def test_a_host_that_is_not_there_is_an_error_of_the_request(monkeypatch):
    with all_public(monkeypatch), pytest.raises(ApiError, match="the connection failed"):
        fetched("http://127.0.0.1:1/a.png")


def test_addresses_are_fetched_only_where_the_command_line_says_so(host, monkeypatch):
    assert not ServedOptions().allow_image_urls and not Limits().allow_image_urls
    before = len(host.paths)
    with all_public(monkeypatch), serving() as running:
        answer = ask_chat(running, asked(at(host)))
    assert answer.status == 400 and "--allow-image-urls" in answer.error["message"]
    assert len(host.paths) == before


def test_every_dialect_reads_an_image_by_its_address(host, monkeypatch):
    with all_public(monkeypatch), serving(limits=OPEN) as running:
        base, url = f"http://127.0.0.1:{running.port}", at(host)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        claude = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)
        found = []
        for given in (url, data_url(PICTURE)):
            chat = client.chat.completions.create(
                model="bundled", messages=asked(given), max_tokens=8
            )
            part = {"type": "input_image", "image_url": given, "detail": "auto"}
            turn = {"role": "user", "content": [part]}
            response = client.responses.create(model="bundled", input=[turn], max_output_tokens=8)
            question = {"type": "predicate", "instructions": "Is it red?"}
            decided = client.decisions.create(model="bundled", input=[turn], questions=[question])
            found.append(
                (
                    chat.usage.prompt_tokens,
                    response.usage.input_tokens,
                    decided.usage.input_tokens,
                    decided.answers[0].probability,
                )
            )
        sources = (
            {"type": "url", "url": url},
            {"type": "base64", "media_type": "image/png", "data": data_url(PICTURE).split(",")[1]},
        )
        counts = {
            claude.messages.count_tokens(
                model="bundled",
                messages=[{"role": "user", "content": [{"type": "image", "source": source}]}],
            ).input_tokens
            for source in sources
        }
    assert found[0][:3] == found[1][:3] and len(counts) == 1 and not running.bugs
    assert found[0][3] == pytest.approx(found[1][3], abs=1e-4)
