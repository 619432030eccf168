"""Where fused layers are faster than separate ones, and how they cut their work; measured on one H200 in bf16.

Every tile recomputes the norm of its rows, and reads the weights that it needs. That pays while rows are narrow, or if
there is so little work that launches decide.
"""

# The GPU is full if a program of each multiprocessor has work.
WANTED_PROGRAMS = 128
# Below these, launches decide. Rows times channels times channels is the work of a linear layer.
FEW_ROWS, LITTLE_WORK = 2**14, 2**25


def padded(number: int) -> int:
    """Round up to a power of two, at least 16, which matrix products need."""
    return max(16, 1 << (number - 1).bit_length())


def norm_linear_pays(num_rows: int, channels: int) -> bool:
    """Return whether to fuse the norm and a linear layer from so many channels."""
    block = padded(channels)
    if block <= 64 or num_rows * block**2 <= LITTLE_WORK:
        return block <= 512
    return block <= 128 and num_rows >= FEW_ROWS


def norm_linear_tile(num_rows: int, channels: int, columns: int) -> dict[str, int]:
    """Choose rows and columns of a tile, how many tiles a program computes one after the other, and launch options."""
    block = padded(channels)
    if num_rows >= FEW_ROWS and block <= 128:
        wide = 128 if block <= 64 else 64
        return {"ROWS": 64, "COLUMNS": wide, "TURNS": -(-columns // wide), "num_warps": 4, "num_stages": 2}
    tiles = [(32, 128), (32, 64), (16, 64), (16, 32)]
    rows, wide = next(
        (tile for tile in tiles if -(-num_rows // tile[0]) * -(-columns // tile[1]) >= WANTED_PROGRAMS), tiles[-1]
    )
    return {"ROWS": rows, "COLUMNS": wide, "TURNS": 1, "num_warps": 4, "num_stages": 2}


def norm_mlp_pays(num_rows: int, channels: int) -> bool:
    """Return whether to fuse the norm and an MLP, or the norm, window attention and its linear layers."""
    block = padded(channels)
    return block <= 64 or (block <= 128 and num_rows >= 2048)


def norm_mlp_tile(num_rows: int, channels: int) -> dict[str, int]:
    """Choose the rows of a program, its hidden channels at a time, and launch options."""
    narrow = padded(channels) <= 64
    if num_rows >= FEW_ROWS:
        chunk, stages, registers = (64, 2, 128) if narrow else (32, 3, 168)
        return {"ROWS": 64, "CHUNK": chunk, "num_warps": 4, "num_stages": stages, "maxnreg": registers}
    if num_rows >= 4096:
        return {"ROWS": 32, "CHUNK": 64, "num_warps": 4, "num_stages": 3}
    chunk, stages = (128, 2) if narrow else (64, 3)
    return {"ROWS": 16, "CHUNK": chunk, "num_warps": 4, "num_stages": stages}


def attention_tile(num_rows: int, channels: int) -> dict[str, int]:
    """Choose launch options; a program takes a window. Fewer registers let more programs run at once."""
    registers = {"maxnreg": 128 if padded(channels) <= 64 else 168} if num_rows >= FEW_ROWS else {}
    return {"num_warps": 4, "num_stages": 2, **registers}


def gated_norm_linear_pays(num_rows: int, channels: int) -> bool:
    """Return whether to fuse the gated norm of so many channels, and the linear layer after it."""
    block = padded(channels)
    return block <= 128 or (block <= 256 and num_rows <= 2048)


def gated_norm_linear_tile(num_rows: int, channels: int, columns: int) -> dict[str, int]:
    """Choose rows and columns of a program, and launch options."""
    rows = 64 if num_rows >= FEW_ROWS else 32 if padded(channels) <= 128 else 16
    return {"ROWS": rows, "COLUMNS": min(64, padded(columns)), "num_warps": 4, "num_stages": 2}
