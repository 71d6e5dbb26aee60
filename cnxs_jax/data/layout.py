"""Where the sprites of a scene go: boxes and painter's order, by rejection sampling.

A box is (x0, y0, x1, y1) in px with exclusive ends; a shape is (height, width).
"""

HIDDEN_AT_MOST = 0.5  # of the back sprite of "in front of"
HIDDEN_AT_LEAST = 0.15
# Longest side of a sprite as a fraction of the picture (24 or 32 px of 64), and the grid of the
# positions (8 px of 64: a token of the small DiT). A caption leaves both open, and that is what
# makes a few ODE steps blur. Finer choices were tried first: with every pixel and every size from
# 20 to 38 px a DiT of four million parameters still drew blobs after 64,000 pictures, with a grid
# of 4 px after 96,000, since each sprite then has many phases within a token to learn one by one.
EXTENT = (24 / 64, 32 / 64)
GRID = 8 / 64


def draw_layout(world, rng, facts, size):
    """Boxes and painter's order. Returns `(objects, order)`, `order` lists indices back to front.

    Sprites do not overlap, except that A "in front of" B hides 15 to 50 % of B. Positions on the
    grid and sizes are uniform over what fits. A try that does not fit is thrown away, sizes
    included.
    """
    kind = facts["relation"] and facts["relation"][1]
    extents = [round(f * size) for f in EXTENT]
    while True:
        objects = []
        for concept in facts["concepts"]:
            obj = {"concept": concept, "style": facts["style"]}
            obj["extent"] = extents[rng.integers(len(extents))]
            objects.append(obj)
        shapes = [world.solid(o).shape for o in objects]
        boxes = _place(rng, shapes, kind, size)
        if boxes is None:
            continue
        for o, box in zip(objects, boxes, strict=True):
            o["box"] = box
        order = [int(i) for i in rng.permutation(len(objects))]
        if kind == "in front of":
            if not HIDDEN_AT_LEAST <= _hidden(world, *objects[:2]) <= HIDDEN_AT_MOST:
                continue
            a, b = order.index(0), order.index(1)
            if a < b:
                order[a], order[b] = 1, 0
        for rank, i in enumerate(order):
            objects[i]["depth"] = rank + 1
        return objects, order


def _place(rng, shapes, kind, size):
    """Boxes for `shapes` ((h, w) each) under a relation of the first two; None: did not fit."""
    u, step = rng.random(8), max(round(GRID * size), 1)
    boxes = []
    if kind == "left of" or kind == "above":
        axis = 1 if kind == "left of" else 0  # of (h, w)
        starts = _side_by_side(u, shapes[0], shapes[1], axis, size, step)
        if starts is None:
            return None
        boxes = [_box(s, shape) for s, shape in zip(starts, shapes, strict=False)]
    elif kind == "in front of":
        (ha, wa), (hb, wb) = shapes[:2]
        back = (_start(u[0], size - hb, step), _start(u[1], size - wb, step))
        reach = (0.8 * (ha + hb) / 2, 0.8 * (wa + wb) / 2)
        top = step * round((back[0] + hb / 2 + (2 * u[2] - 1) * reach[0] - ha / 2) / step)
        left = step * round((back[1] + wb / 2 + (2 * u[3] - 1) * reach[1] - wa / 2) / step)
        if not (0 <= top <= size - ha and 0 <= left <= size - wa):
            return None
        boxes = [_box((top, left), shapes[0]), _box(back, shapes[1])]
    for h, w in shapes[len(boxes) :]:
        for _ in range(12):
            v = rng.random(2)
            box = _box((_start(v[0], size - h, step), _start(v[1], size - w, step)), (h, w))
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _start(u, room, step):
    """A multiple of `step` in [0, room], uniform for uniform `u` in [0, 1)."""
    return step * int(u * (room // step + 1))


def _side_by_side(u, a, b, axis, size, step):
    """Starts (top, left) with A wholly before B on `axis`, and nearer to that axis than across."""
    slack = size - a[axis] - b[axis]
    if slack < 0:
        return None
    first, second = sorted(_start(v, slack, step) for v in u[:2])
    across = [_start(v, size - s[1 - axis], step) for v, s in zip(u[2:4], (a, b), strict=True)]
    second += -(-a[axis] // step) * step  # the next place on the grid behind A
    if second + b[axis] > size:
        return None
    along_gap = (second + b[axis] / 2) - (first + a[axis] / 2)
    across_gap = (across[1] + b[1 - axis] / 2) - (across[0] + a[1 - axis] / 2)
    if abs(across_gap) > 0.75 * along_gap:
        return None
    starts = [(first, across[0]), (second, across[1])]
    return [s[::-1] for s in starts] if axis == 1 else starts


def _box(start, shape):
    return (start[1], start[0], start[1] + shape[1], start[0] + shape[0])


def _apart(p, q):
    return p[2] <= q[0] or q[2] <= p[0] or p[3] <= q[1] or q[3] <= p[1]


def _hidden(world, front, back):
    """The fraction of `back`'s solid pixels that `front`'s solid pixels cover."""
    p, q = front["box"], back["box"]
    x0, y0, x1, y1 = max(p[0], q[0]), max(p[1], q[1]), min(p[2], q[2]), min(p[3], q[3])
    if x0 >= x1 or y0 >= y1:
        return 0.0
    over = world.solid(front)[y0 - p[1] : y1 - p[1], x0 - p[0] : x1 - p[0]]
    under = world.solid(back)[y0 - q[1] : y1 - q[1], x0 - q[0] : x1 - q[0]]
    return (over & under).sum() / world.solid(back).sum()
