"""mlx_diffgemma.serve: serve a model over HTTP."""

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings
from ..config.serving import Limits
from ..errors import ConfigError
from .options import ContextOptions, SeeingModelOptions, command, run, unescape

KEY_VARIABLE = "MLX_DIFFGEMMA_API_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class AddressOptions:
    """Where the server listens, and to whom."""

    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0 for any free one.", min=0, max=65535)
    ] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that requests must have; better given in the environment, where other "
            "users of this machine do not see it.",
            envvar=KEY_VARIABLE,
            show_envvar=True,
        ),
    ] = None
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen at an address of the network without a key."),
    ] = False
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="One more name by which clients reach this server; may be repeated."),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web pages that may use this server, such as https://chat.example; may be "
            "repeated."
        ),
    ] = None

    def access(self) -> Any:
        """Return who may ask.

        Raises:
          ConfigError: if the network is let in without a key.
        """
        from ..serve.security import Access

        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("--api-key is empty; leave it out, or give a key")
        if self.host not in _LOCAL and self.api_key is None and not self.insecure:
            raise ConfigError(
                f"--host {self.host} lets the network in: give --api-key KEY (or set "
                f"{KEY_VARIABLE}), or --insecure if anybody may use this server"
            )
        named = () if _is_address(self.host) else (self.host,)
        hosts = (*named, *(self.allow_host or ()))
        return Access(self.api_key, hosts, tuple(self.allow_origin or ()))


@dataclass(frozen=True)
class ServedOptions:
    """What is served, and how requests share it."""

    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Adapters as one more model, which shares the weights; may be repeated.",
        ),
    ] = None
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="One more name for the model, such as 'claude-*', where * stands for any "
            "characters; may be repeated."
        ),
    ] = None
    max_rows: Annotated[
        int, typer.Option(help="Answers that are written together, per model.", min=1)
    ] = 8
    max_queue: Annotated[
        int, typer.Option(help="Further requests that may wait, per model.", min=1)
    ] = 64
    thinking: Annotated[
        bool,
        typer.Option(
            "--thinking/--no-thinking", help="Let the model think where a request says nothing."
        ),
    ] = False
    allow_image_urls: Annotated[
        bool,
        typer.Option(
            "--allow-image-urls",
            help="Fetch images that requests name by an http or https address; never from this "
            "machine or a private network.",
        ),
    ] = False
    fill_prompt: Annotated[
        str | None,
        typer.Option(
            help="What the model is told of code with a gap: {code} is the code with ____ in it, "
            "{files} are other files; \\n is a line break."
        ),
    ] = None

    def adapters(self) -> dict[str, Path]:
        """Return the folders by name.

        Raises:
          ConfigError: if one cannot be read.
        """
        found: dict[str, Path] = {}
        for given in self.adapter or ():
            name, is_given, folder = given.partition("=")
            if not (name and is_given and folder):
                raise ConfigError(f"--adapter must be NAME=FOLDER, got {given!r}")
            if name in found:
                raise ConfigError(f"--adapter {name} is given twice")
            found[name] = Path(folder)
        return found


@command
def serve(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no line for each request.")] = False,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser once the model is loaded.")
    ] = False,
    *,
    model: SeeingModelOptions,
    address: AddressOptions,
    served: ServedOptions,
    contexts: ContextOptions,
    limits: Limits,
    settings: GenerationSettings,
) -> None:
    """Serve a model over HTTP, in the dialects of OpenAI's clients; docs/server.md lists the
    routes."""
    adapters, store = served.adapters(), contexts.store()
    access = address.access()
    from ..serve.app import application
    from ..serve.server import listen
    from ..serve.server import serve as serve_app
    from ..serve.state import FILL_PROMPT, State

    names = _names(model, adapters, served.alias or [])
    listening = listen(address.host, address.port)
    state = State(
        limits=replace(limits, allow_image_urls=served.allow_image_urls),
        settings=settings,
        thinking=served.thinking,
        aliases=tuple(served.alias or ()),
        fill_prompt=FILL_PROMPT if served.fill_prompt is None else unescape(served.fill_prompt),
    )

    def say(line: str) -> None:
        typer.echo(line, err=True)

    def on_ready(_: Any) -> None:
        host, port = listening.getsockname()[:2]
        for line in _hello(names[0], host, port, access.key is not None):
            say(line)
        if open_page:
            import webbrowser

            webbrowser.open(_address(host, port))

    app = application(state, access, log=None if quiet else say, on_bug=_report)
    for note in model.notes():
        say(note)
    has_ended = serve_app(
        app,
        state,
        listening,
        lambda: _load(model, adapters, names, served, store, settings),
        on_ready=on_ready,
        end_now=lambda: os._exit(130),
    )
    if not has_ended:
        os._exit(0)  # a step takes longer than anybody wants to wait


def _names(
    model: SeeingModelOptions, adapters: Mapping[str, Path], aliases: list[str]
) -> list[str]:
    """Return the names of all models, the default one first.

    Raises:
      ConfigError: if two have the same.
    """
    source = str(model.source)
    given = Path(source).resolve().name if Path(source).is_dir() else source
    names = ["bundled" if model.is_bundled else given, *adapters]
    every = [*names, *aliases]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise ConfigError(f"two models have the name {twice[0]!r}; give the adapter another one")
    return names


def _load(
    model: SeeingModelOptions,
    adapters: Mapping[str, Path],
    names: list[str],
    options: ServedOptions,
    store: Any,
    settings: GenerationSettings,
) -> dict[str, Any]:
    """Load all models, each with its engine.

    Raises:
      DiffGemmaError: if one cannot be loaded, or the settings do not suit it.
    """
    from ..checkpoint.memory import WARN_ABOVE, array_bytes, recommended_bytes
    from ..checkpoint.variants import load_variants
    from ..engine.engine import Engine
    from ..serve.state import Served
    from ..write.chat import chat_store

    folders: dict[str, str | Path] = {"": model.adapter_path} if model.adapter_path else {}
    base, variants, tokenizer = load_variants(
        model.source, folders | dict(adapters), revision=model.revision, vision=model.vision
    )
    settings.resolve(base.config)
    models = [variants.pop("", base), *variants.values()]
    stores = [store or chat_store(), *(chat_store() for _ in adapters)]
    kept = sum(each.max_bytes for each in stores)
    room = int(recommended_bytes() * WARN_ABOVE) - array_bytes(*models) - kept
    return {
        name: Served(
            name,
            Engine(
                each,
                tokenizer,
                max_rows=options.max_rows,
                max_queue=options.max_queue,
                store=own,
                memory_bytes=room // len(models),
            ),
        )
        for name, each, own in zip(names, models, stores, strict=True)
    }


def _hello(name: str, host: str, port: int, has_key: bool) -> list[str]:
    """Return the lines that are printed once the server is ready."""
    page = _address(host, port)
    url = f"{page}v1"
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Sort: 6 3 1 7"}}]}}'
    return [
        f"{name} at {url}, and as a page at {page}",
        f"curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    ]


def _address(host: str, port: int) -> str:
    """Return the address at which this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _is_address(host: str) -> bool:
    from ipaddress import ip_address

    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _report(error: Exception) -> None:
    """Print an error of this program."""
    typer.echo("".join(traceback.format_exception(error)), err=True)


def main() -> None:
    run(serve)


if __name__ == "__main__":
    main()
