"""How two other caches move the same pages, called as their own connectors call it."""

import torch

CHUNK_TOKENS = 256


def vllm_batch(copies, stream):
    """vllm/v1/kv_offload/cpu/gpu_worker.py: one copy per page in one call of its C++ operator."""
    from vllm import _custom_ops

    pages, arena, sizes = (torch.from_numpy(a.astype("int64")) for a in (copies.pages, copies.arena, copies.sizes))

    def call(source, target):
        with torch.cuda.stream(stream):
            _custom_ops.swap_blocks_batch(source, target, sizes)

    return lambda: call(arena, pages), lambda: call(pages, arena)


class LMCache:
    """lmcache/v1/gpu_connector/gpu_connectors.py: chunk by chunk; a load's kernel reads host memory, a save goes
    through a buffer on the GPU and waits for each chunk. For vLLM's packed pages it takes K and V as one (kv_size 1,
    head size doubled; kv_format/specs/nl_x_nb_bs_nh_two_hs.py)."""

    def __init__(self, layout, page_tokens, num_heads):
        from lmcache import c_ops

        self._ops = c_ops
        self._layout = layout
        self._page_tokens = page_tokens
        self._hidden = layout.page_bytes // page_tokens // 2  # bfloat16 values of a token, K beside V
        self._head_size = self._hidden // num_heads
        pointers = [pages.data_ptr() for pages in layout.pages]
        self._pointers = torch.tensor(pointers, dtype=torch.int64, device="cuda")
        self._load_stream, self._save_stream = torch.cuda.Stream(), torch.cuda.Stream()

    def methods(self, blocks):
        step = CHUNK_TOKENS // self._page_tokens
        within = torch.arange(self._page_tokens)
        chunks = []
        for at in range(0, len(blocks), step):
            tokens = (torch.tensor(blocks[at : at + step])[:, None] * self._page_tokens + within).flatten()
            shape = (1, self._layout.num_layers, tokens.numel(), self._hidden)
            chunks.append((tokens.cuda(), torch.empty(shape, dtype=torch.bfloat16, pin_memory=True)))
        whole = (1, self._layout.num_layers, CHUNK_TOKENS, self._hidden)
        buffer = torch.empty(whole, dtype=torch.bfloat16, device="cuda")

        def load():
            with torch.cuda.stream(self._load_stream):
                for slots, host in chunks:
                    self._transfer(host, slots, self._ops.TransferDirection.H2D)
            self._load_stream.synchronize()

        def save():
            for slots, host in chunks:
                with torch.cuda.stream(self._save_stream):
                    if slots.numel() == CHUNK_TOKENS:
                        self._transfer(buffer, slots, self._ops.TransferDirection.D2H)
                        host.copy_(buffer, non_blocking=True)
                    else:
                        self._transfer(host, slots, self._ops.TransferDirection.D2H)
                self._save_stream.synchronize()

        self._check(chunks, load, save)
        return load, save

    def _transfer(self, chunk, slots, direction):
        self._ops.multi_layer_kv_transfer(
            chunk,
            self._pointers,
            slots,
            slots.device,
            self._layout.num_blocks * self._page_tokens,
            direction,
            self._ops.EngineKVFormat.NL_X_NB_BS_NH_TWO_HS,
            block_size=self._page_tokens,
            head_size=self._head_size,
        )

    def _check(self, chunks, load, save):
        """Saved, wiped, loaded: the pages are as they were. Otherwise the times would say nothing."""
        before = [pages.clone() for pages in self._layout.pages]
        torch.cuda.synchronize()
        save()
        for pages in self._layout.pages:
            rows = torch.cat([slots for slots, _ in chunks]).div(self._page_tokens, rounding_mode="floor").unique()
            pages[rows] = 0
        torch.cuda.synchronize()
        load()
        assert all(torch.equal(a, b) for a, b in zip(before, self._layout.pages, strict=True))
