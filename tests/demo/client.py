"""A server of the demo and a client without manners: it sends what a browser would not."""

import contextlib
import http.client
import json
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
START, ANSWER = 300, 300  # seconds that a start and an answer may take on a busy machine


class Server:
    """A running page. `log` is what it printed, `port` where it listens.

    `path` is where Python finds the library; None: where `python` has it installed.
    """

    def __init__(self, folder, *arguments, python=sys.executable, path=ROOT):
        self.port, self.folder = _free_port(), folder
        command = [python, "-m", "cnxs_jax.demo", f"--port={self.port}", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(path or ""), "JAX_NUM_CPU_DEVICES": "1"}
        self.output = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self.output, stderr=subprocess.STDOUT
        )
        self.call = self.fields = None
        self._wait()

    def _wait(self):
        end = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                config = json.loads(self.request("GET", "/config")[1])
                (draw,) = [d for d in config["dependencies"] if d["api_name"] == "draw"]
                self.call, self.fields = draw["id"], len(draw["inputs"])
                return
            time.sleep(0.5)
        self.stop()
        raise AssertionError(self.log[-2000:])

    @property
    def log(self):
        return (self.folder / "server.log").read_text()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.output.close()

    def memory(self):
        """MiB of the process that are in memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, text) of one HTTP request."""
        with contextlib.closing(self._connect(timeout)) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    def _connect(self, timeout):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, data, **changes):
        """(status, warnings, pictures, whole text) of one request for pictures."""
        session = secrets.token_hex(8)
        body = {"data": data, "fn_index": self.call, "session_hash": session, **changes}
        kind = {"Content-Type": "application/json"}
        status, text = self.request("POST", "/gradio_api/queue/join", json.dumps(body), kind)
        if status != 200:
            return status, [], [], text
        return status, *self._listen(session)

    def _listen(self, session):
        warnings, pictures, text = [], [], ""
        with contextlib.closing(self._connect(ANSWER)) as connection:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
            for line in connection.getresponse():
                text += line.decode(errors="replace")
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if event["msg"] == "log":
                    warnings.append(event["log"])
                if event["msg"] == "process_completed" and event["success"]:
                    pictures = event["output"]["data"][1].get("pictures", [])
                if event["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                    break
        return warnings, pictures, text


def _free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
