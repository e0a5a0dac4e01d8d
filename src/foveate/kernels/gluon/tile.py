"""What a tile is: its place among heads and rows, the steps it has under a rule, a dense layout or its list, and the words
in shared memory by which a producer tells consumers of it."""

from .masks import word
from .shim import gl, gluon

WORDS = gl.constexpr(8)  # of a tile: steps, masked, tail, query block, batch row, head; window and sink of a rule


@gluon.jit
def leave_tile(words, line, one, n, masked, tail, block, b, h):
    """The producer's part: words `line` to `line + 5`. one: int32 1 of the partition's layout."""
    words.index(line).store(one * n)
    words.index(line + 1).store(one * masked)
    words.index(line + 2).store(one * tail)
    words.index(line + 3).store(one * block)
    words.index(line + 4).store(one * b)
    words.index(line + 5).store(one * h)


@gluon.jit
def read_tile(words, line):
    """A consumer's part: (steps, masked steps, tail, query block, batch row, head)."""
    n = word(words, line)
    masked = word(words, line + 1)
    tail = word(words, line + 2)
    block = word(words, line + 3)
    b = word(words, line + 4)
    return n, masked, tail, block, b, word(words, line + 5)


@gluon.jit
def place(t, H, G, NQ, BLOCK: gl.constexpr):
    """(batch row, head, kv head, query block) of tile t: kv heads outermost, late query blocks first, then the group.

    A tile of 64-row blocks holds one block of two neighbouring heads, of which `head` is the first.
    """
    PACK: gl.constexpr = 128 // BLOCK
    group = H // G // PACK
    size = group * NQ
    bg = t // size
    r = t - bg * size
    back = r // group
    b = bg // G
    g = bg - b * G
    return b, (g * group + (r - back * group)) * PACK, g, NQ - 1 - back


@gluon.jit
def _dense_plan(block, N, M, CAUSAL: gl.constexpr):
    """(steps, masked steps) of a query block of a dense layout."""
    if CAUSAL:
        first = M - N + block * 128  # position of the first row
        stop = gl.minimum(gl.maximum(first + 128, 0), M)
        whole = gl.minimum(gl.maximum(first + 1, 0), M) // 128
    else:
        stop = M + 0
        whole = M // 128
    n = gl.maximum((stop + 127) // 128, 1)
    return n, gl.maximum(n - whole, 1)


@gluon.jit
def _rule_plan(block, N, M, window, sink):
    """(first key block, window steps, all steps, masked steps, tail) of a query block under sink and window, causal.

    Key blocks go down from the diagonal to the window's left edge, then from the last block of the sink to block 0. Steps
    before `masked` hold keys that some row must not see yet, steps from `tail` on keys too old for some row.
    """
    first = M - N + block * 128
    stop = gl.minimum(gl.maximum(first + 128, 0), M)  # keys from here on are seen by no row
    low = gl.maximum(first - window + 1, 0)
    top = (stop + 127) // 128 - 1
    bottom = low // 128
    near = gl.where((window > 0) & (low < stop), top + 1 - bottom, 0)
    below = gl.where(near > 0, bottom, top + 1)
    n = near + gl.minimum((gl.minimum(sink, stop) + 127) // 128, below)
    whole = gl.minimum(gl.maximum(first + 1, 0), M) // 128
    edge = (gl.maximum(stop - window, 0) + 127) // 128  # from this block on every row's window holds the keys
    tail = gl.minimum(gl.maximum(top + 1 - edge, 0), near)
    return gl.where(near > 0, top, n - 1), near, gl.maximum(n, 1), gl.maximum(top + 1 - whole, 1), tail


@gluon.jit
def open_tile(t, lists, strides, share, T, H, G, NQ, N, M, CAUSAL: gl.constexpr, DENSE: gl.constexpr,
              WIDTH: gl.constexpr, COLS: gl.constexpr, RULE: gl.constexpr, DIAG: gl.constexpr,
              BLOCK: gl.constexpr):  # fmt: skip
    """What the producer must know of tile t.

    Its place (b, h, g, block), its list and that of its columns (pointers), the position of its first step in the list,
    entries, masked steps, tail (see `_consumer`), all steps, and two numbers: (window steps, 0) of a rule, (steps of
    tiles, columns used) of lists with columns.
    """
    tiles_ptr, plan_ptr, cols_ptr = lists
    b, h, g, block = place(gl.minimum(t, T - 1), H, G, NQ, BLOCK)
    head = h // share
    row = tiles_ptr
    cols = cols_ptr
    tail = 0
    x = 0
    y = 0
    window = 0
    sink = 0
    if DENSE:
        count, masked = _dense_plan(block, N, M, CAUSAL)
        n = count
        pos = count - 1
    elif RULE:
        at = plan_ptr + 2 * (b * strides[3] + head)
        window = gl.minimum(gl.load(at), 1 << 30)
        sink = gl.load(at + 1)
        pos, x, n, masked, tail = _rule_plan(block, N, M, window, sink)
        count = n
    else:
        PLAN: gl.constexpr = 4 if COLS else 2
        at = plan_ptr + PLAN * (b * strides[3] + head * NQ + block)
        count = gl.load(at)
        masked = gl.load(at + 1)
        line = (block + strides[8]) // strides[7]  # the row of lists that serves this tile
        row = tiles_ptr + (b.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + line.to(gl.int64) * strides[2])
        pos = count - 1
        n = gl.maximum((count + (128 // WIDTH - 1)) // (128 // WIDTH), 1)
        if DIAG:  # distances are ascending: their keys come in the kernel's order from the list's front
            row += masked + gl.maximum(pos, 0)
        if COLS:
            x = n
            y = gl.load(at + 2)
            tail = n + gl.load(at + 3)
            n = x + ((y + 127) >> 7)
            cols = cols_ptr + (b.to(gl.int64) * strides[4] + head.to(gl.int64) * strides[5] + line.to(gl.int64) * strides[6])
    return b, h, g, block, row, cols, pos, count, masked, tail, n, x, y, window, sink
