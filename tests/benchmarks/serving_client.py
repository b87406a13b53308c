"""Many clients of an OpenAI server at once, in a process of their own: what they got, and when. Prints a JSON document.

Each client sends its next request as soon as the last one has ended. HTTP/1.0, so that a stream is what comes until the
connection closes. Prompts are token ids, so that their length is exact and no tokenizer is timed.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Client:
    """What all requests of a run gave. Times in seconds."""

    first: list[float] = field(default_factory=list)
    """From sending a request to its first token."""
    between: list[float] = field(default_factory=list)
    """From one event with text to the next; several tokens may share one."""
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    cached_tokens: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)

    async def request(self, args: argparse.Namespace, prompt: list[int], seed: int) -> None:
        body = {
            "model": args.model, "prompt": prompt, "max_tokens": args.max_tokens, "temperature": args.temperature,
            "seed": seed, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.0\r\nHost: {args.host}:{args.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        began = last = time.perf_counter()
        reader, writer = await asyncio.open_connection(args.host, args.port, limit=1 << 20)
        try:
            writer.write(head.encode() + data)
            await writer.drain()
            status = (await reader.readline()).split()
            if len(status) < 2 or status[1] != b"200":
                if status[1:2] == [b"429"]:
                    self.refused += 1
                    await reader.read()
                    await asyncio.sleep(0.5)
                else:
                    self.failed.append(f"{status} {(await reader.read())[-300:]!r}")
                return
            usage, begun, done = None, False, False
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                now = time.perf_counter()
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event.get("error"):
                    self.failed.append(str(event["error"]))
                elif event.get("choices"):
                    (self.between if begun else self.first).append(now - (last if begun else began))
                    begun, last = True, now
            if not done or usage is None or usage["completion_tokens"] != args.max_tokens:
                self.failed.append(f"ended early: {usage}")
                return
            self.tokens += usage["completion_tokens"]
            self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            self.whole.append(time.perf_counter() - began)
        finally:
            writer.close()

    async def run(self, args: argparse.Namespace) -> float:
        """All requests of all clients; how long they took together."""
        order = random.Random(args.seed)
        shared = [order.randrange(3, args.vocab) for _ in range(args.shared_tokens)]
        prompts = [
            shared + [order.randrange(3, args.vocab) for _ in range(args.prompt_tokens - args.shared_tokens)]
            for _ in range(args.requests)
        ]
        todo = list(enumerate(prompts))

        async def client() -> None:
            while todo:
                number, prompt = todo.pop(0)
                refused = self.refused
                await self.request(args, prompt, number)
                if self.refused > refused and args.insist:
                    todo.append((number, prompt))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(args.concurrency)))
        return time.perf_counter() - began


def at_share(values: list[float], share: float) -> float | None:
    """The value that this share of them does not exceed, in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--shared-tokens", type=int, default=0, help="that all prompts begin with")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--insist", action="store_true", help="send again what was refused because the queue was full")
    args = parser.parse_args()
    client = Client()
    seconds = asyncio.run(client.run(args))
    result: dict[str, Any] = {
        "concurrency": args.concurrency,
        "requests": len(client.whole),
        "refused": client.refused,
        "failed": len(client.failed),
        "first_failure": client.failed[0] if client.failed else None,
        "tokens": client.tokens,
        "cached_tokens": client.cached_tokens,
        "seconds": seconds,
        "tok_s": client.tokens / seconds,
        "first_ms": {"p50": at_share(client.first, 0.5), "p99": at_share(client.first, 0.99)},
        "between_ms": {"p50": at_share(client.between, 0.5), "p99": at_share(client.between, 0.99)},
        "longest_s": max(client.whole, default=None),
    }
    json.dump(result, sys.stdout)
    print()
    return 1 if client.failed else 0


if __name__ == "__main__":
    sys.exit(main())
