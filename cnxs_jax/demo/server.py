"""Serves the page on loopback."""

import gradio as gr
from starlette.middleware import Middleware

from cnxs_jax.demo.guard import HOST, QUEUE, Guard
from cnxs_jax.demo.page import page
from cnxs_jax.errors import ConfigError

SESSIONS = QUEUE + 4  # gradio keeps a session's last inputs, pictures too; the page needs none


def serve(studio, port):
    """Serves until it is interrupted. Raises ConfigError for a port that is taken."""
    blocks = page(studio)
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    fonts = ["system-ui", "sans-serif"]  # gradio's own come from another host
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            max_threads=4,
            state_session_capacity=SESSIONS,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            footer_links=[],
            run_history=False,
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            app_kwargs={"middleware": [Middleware(Guard)]},
        )
    except OSError:
        raise ConfigError(f"port {port} is taken", "--port", "name another one") from None
    print(f"The page is at http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
