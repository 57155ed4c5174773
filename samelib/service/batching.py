"""Micro-batches: requests that wait while the model works are computed together, next."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

THREAD = "samelib-model"


class QueueFull(RuntimeError):
    """There is no place for so many images now; nothing of the request was taken."""


@dataclass
class Job:
    """One request: its images and what else there is of each, who sent it, and where its results go."""

    columns: tuple[Tensor, ...]
    account: str
    done: asyncio.Future

    def __len__(self) -> int:
        return len(self.columns[0])


class Batcher:
    """A queue in front of one thread that computes. Nobody waits for a batch to fill: what is there is taken, in its
    order.

    Args:
        compute: N accounts, and tensors of N rows each as `submit` took them -> tensors of N rows each.
        most_images: of one batch, and so of one request.
        capacity: images that may wait or be in work.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], most_images: int, capacity: int):
        self._compute, self.most_images, self.capacity = compute, most_images, capacity
        self.pending = 0  # images that wait or are in work
        self._waiting: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, THREAD)
        self._pump: asyncio.Task | None = None

    async def close(self, seconds: float) -> None:
        """Finishes what was taken, then stops; without what takes longer than so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.pending:
                    await asyncio.sleep(0.01)
        if self._pump:
            self._pump.cancel()
        self._thread.shutdown(wait=not self.pending, cancel_futures=True)

    async def submit(self, account: str, *columns: Tensor) -> tuple[Tensor, ...]:
        """The rows of the images of one request: uint8 [N, C, H, W], and what else there is of each. A caller that is
        cancelled leaves its place in the queue to be skipped.

        Raises:
            QueueFull: at once.
            Exception: whatever `compute` raised.
        """
        job = Job(columns, account, asyncio.get_running_loop().create_future())
        if self.pending + len(job) > self.capacity:
            raise QueueFull(f"{self.pending} images are waiting, the queue takes {self.capacity}")
        self._pump = self._pump or asyncio.create_task(self._run())  # the first request knows the loop
        self.pending += len(job)
        self._waiting.append(job)
        self._wake.set()
        return await job.done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            jobs = self._next_batch()
            if not jobs:
                self._wake.clear()
                continue
            accounts = [job.account for job in jobs for _ in range(len(job))]
            try:
                columns = [torch.cat(parts) for parts in zip(*(job.columns for job in jobs), strict=True)]
                results = await loop.run_in_executor(self._thread, self._compute, accounts, *columns)
            except Exception as error:
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)
            else:
                parts = zip(*(result.split(list(map(len, jobs))) for result in results), strict=True)
                for job, rows in zip(jobs, parts, strict=True):
                    if not job.done.done():
                        job.done.set_result(rows)
            finally:
                self.pending -= len(accounts)

    def _next_batch(self) -> list[Job]:
        """The oldest requests, as many as fit into a batch; those that nobody waits for any more are dropped."""
        jobs, room = [], self.most_images
        while self._waiting and len(self._waiting[0]) <= room:
            job = self._waiting.popleft()
            if job.done.done():
                self.pending -= len(job)
                continue
            jobs.append(job)
            room -= len(job)
        return jobs
