"""What the server lets in: few paths, small bodies, no other name. Needs no gradio."""

HOST = "127.0.0.1"
NAMES = {HOST, "localhost"}  # other names in a request: a page elsewhere that points here
QUEUE = 20
MAX_BODY = 3 * 6 * 2**20  # three pictures as text
# What the page needs; gradio has more: uploads, files, component functions, calls past the queue.
PATHS = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
PATHS |= {f"/gradio_api/{name}" for name in ("queue/join", "queue/data", "info", "startup-events")}
PATHS |= {"/gradio_api/app_id", "/gradio_api/cancel", "/gradio_api/reset"}
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; "
    "font-src 'self' data:; frame-ancestors 'none'; form-action 'self'"
)


class Guard:
    """ASGI middleware: refuses what the page does not need, and forbids the browser other hosts."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":  # start and stop; the page has no web sockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        status = refusal(scope["path"], headers)
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, _limited(receive), _with_policy(send))


def refusal(path, headers):
    """The HTTP status with which a request is refused, or None."""
    if headers.get("host", "").rsplit(":", 1)[0] not in NAMES:
        return 403
    if path not in PATHS and not path.startswith(FOLDERS):
        return 404
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MAX_BODY:
        return 413
    return None


def _limited(receive):
    """`receive` for bodies that do not say their length: beyond the limit the client has left."""
    seen = 0

    async def limited():
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= MAX_BODY else {"type": "http.disconnect"}

    return limited


def _with_policy(send):
    async def sending(message):
        if message["type"] == "http.response.start":
            policy = (b"content-security-policy", POLICY.encode())
            message = {**message, "headers": [*message.get("headers", []), policy]}
        await send(message)

    return sending
