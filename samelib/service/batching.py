"""Micro-batches: requests that wait while the model works are computed together, next."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor


class QueueFull(RuntimeError):
    """There is no place for so many images now; nothing of the request was taken."""


@dataclass
class Job:
    """One request: its images, whether each is paid for, who sent it, and where its results go."""

    images: Tensor
    paid: Tensor
    account: str
    done: asyncio.Future


class Batcher:
    """A queue in front of one thread that computes. Nobody waits for a batch to fill: what is there is taken, in its
    order.

    Args:
        compute: images uint8 [N, C, H, W], bool [N] and N accounts -> tensors of N rows each.
        most_images: of one batch, and so of one request.
        capacity: images that may wait or be in work.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]], most_images: int, capacity: int):
        self._compute, self.most_images, self.capacity = compute, most_images, capacity
        self.pending = 0  # images that wait or are in work
        self._waiting: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "samelib-model")
        self._pump: asyncio.Task | None = None

    def start(self) -> None:
        self._pump = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Finishes what was taken, then stops."""
        while self.pending:
            await asyncio.sleep(0.01)
        self._pump.cancel()
        self._thread.shutdown()

    async def submit(self, images: Tensor, paid: Tensor, account: str) -> tuple[Tensor, ...]:
        """The rows of these images. A caller that is cancelled leaves its place in the queue to be skipped.

        Raises:
            QueueFull: at once.
            Exception: whatever `compute` raised.
        """
        if self.pending + len(images) > self.capacity:
            raise QueueFull(f"{self.pending} images are waiting, the queue takes {self.capacity}")
        job = Job(images, paid, account, asyncio.get_running_loop().create_future())
        self.pending += len(images)
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
            images, paid = torch.cat([job.images for job in jobs]), torch.cat([job.paid for job in jobs])
            accounts = [job.account for job in jobs for _ in job.images]
            try:
                columns = await loop.run_in_executor(self._thread, self._compute, images, paid, accounts)
            except Exception as error:
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)
            else:
                sizes = [len(job.images) for job in jobs]
                parts = zip(*(column.split(sizes) for column in columns), strict=True)
                for job, rows in zip(jobs, parts, strict=True):
                    if not job.done.done():
                        job.done.set_result(rows)
            finally:
                self.pending -= len(images)

    def _next_batch(self) -> list[Job]:
        """The oldest requests, as many as fit into a batch; those that nobody waits for any more are dropped."""
        jobs, room = [], self.most_images
        while self._waiting and len(self._waiting[0].images) <= room:
            job = self._waiting.popleft()
            if job.done.done():
                self.pending -= len(job.images)
                continue
            jobs.append(job)
            room -= len(job.images)
        return jobs
