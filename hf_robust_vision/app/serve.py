"""Start the app, closed to the outside: no analytics, no fonts or scripts from elsewhere, nothing kept."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any


# What the browser may load and talk to: this server alone.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'; object-src 'none'"


class OwnOnly:
    """Middleware that sends `POLICY` with every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, with one header more."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(
    pairs: Sequence[tuple[str, str]] = (), *, host: str = "127.0.0.1", port: int | None = None, wait: bool = True
) -> Any:
    """Serve the app until it is interrupted.

    Args:
        pairs: Models and their hardened twins to choose from, before those of the demo.
        host: Address to listen at. Only at a loopback address may visitors name models of their own: elsewhere they
            could read what lies on this machine, or let it fetch anything.
        port: By default the first free one from 7860 on.
        wait: Until interrupted; else the running app is returned.

    Raises:
        ModuleNotFoundError: If gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    # Of its own, so that what visitors upload ends with the app.
    os.environ["GRADIO_TEMP_DIR"] = uploads = tempfile.mkdtemp(prefix="hf-robust-vision-app-")
    atexit.register(shutil.rmtree, uploads, ignore_errors=True)
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the app needs gradio: pip install "hf-robust-vision[app]"') from error
    from .limits import LIMITS
    from .page import DEMO, Pair, make_page
    from .show import style

    own = host in ("127.0.0.1", "localhost", "::1")
    page = make_page([*(Pair(*pair) for pair in pairs), *DEMO], own=own)
    page.queue(max_size=LIMITS.waiting)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(LIMITS.megabytes * 1e6),
        app_kwargs={"middleware": [Middleware(OwnOnly)]},
        theme=gr.themes.Default(**fonts),
        css=style(),
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    print(f"the app is at {page.local_url} (end it with Ctrl-C)", flush=True)
    if wait:
        page.block_thread()
    return page
