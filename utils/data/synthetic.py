"""Synthetic images of cats and dogs, drawn by this program: no download is needed.

An image depends only on (`VERSION`, seed, index). The class decides only the shape cues in `CUES`,
numbers from a typical cat (0) to a typical dog (1): how far the ears hang, how long the muzzle is,
and so on. The classes overlap in every cue, and a cue may be hidden or outside the frame, so no cue
suffices alone. Everything else (coat, pose, place, light, clutter) has the same distribution for
both classes, so colour and brightness do not reveal the class.

Pillow draws the shapes at twice the size; reducing them smooths their edges. NumPy makes textures
and light. Lengths of an animal are in units of its head's radius; x points right and y down.
"""

import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

VERSION = 1  # part of the identity of the data: raise it with any change that alters a pixel
SIZE = 224
CLASSES = ("cat", "dog")

FULL = 2 * SIZE  # side of the canvas for shapes, in pixels
CUES = (
    "flop",
    "ear_round",
    "ear_length",
    "muzzle",
    "nose",
    "skull",
    "eye",
    "pupil",
    "whiskers",
    "tail",
)
CUE_MEAN = (0.15, 0.85)  # of cats, of dogs
CUE_SPREAD = 0.16
CUE_LOST = 0.08  # probability that a cue is uniform in 0..1, in both classes

COATS = (
    "#e29248",
    "#9698a0",
    "#423e42",
    "#eed6ac",
    "#8a5e3e",
    "#f2eee6",
    "#5c4234",
    "#707c8e",
    "#d6b068",
    "#b05c38",
)
WALLS = ("#b0cee2", "#ecdec4", "#a0bc9a", "#e0b8aa", "#707e94", "#4e5a64", "#cec6d8", "#e8c67a")
FLOORS = ("#7a9e54", "#b68a60", "#dac49e", "#8c6650", "#babcbe", "#7090a8", "#b06054")
TOYS = ("#ce5448", "#f0be4c", "#548cbc", "#60965c", "#ece4d6", "#966ea0", "#464a5c")
IRISES = ("#d6a034", "#8eb24e", "#6e4628", "#70a0c4", "#aa763c")
LIT = 215  # the shade that leaves the colour of a coat unchanged
# Colours of lines, noses and tongues.
DARK, LIGHT, PINK = (42, 32, 34, 255), (248, 244, 240, 255), (206, 108, 112, 255)

# Pixel positions relative to the middle.
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE - 0.5
STEPS = np.linspace(0, 1, 14)  # along a curve
ROUND = np.linspace(0, 2 * np.pi, 48, endpoint=False)  # around an ellipse
CIRCLE = np.stack([np.cos(ROUND), np.sin(ROUND)], 1)


def draw(seed: int, index: int) -> tuple[np.ndarray, int]:
    """Draw image `index` of the data set `seed`, both non-negative.

    Returns the image, uint8 RGB (224, 224, 3), and its label, `index % 2`: 0 is a cat, 1 a dog.
    """
    label = index % 2
    rng = np.random.default_rng(np.random.SeedSequence([VERSION, seed, index]))
    scene = _background(rng)
    animal = Animal(rng, label)
    _occlude(rng, animal.detail)
    scene = _over(scene, _fur(rng, animal.fur))
    scene = _over(scene, _planes(animal.detail.reduce(2)))
    return _photograph(rng, scene), label


def _planes(image: Image.Image) -> np.ndarray:
    """Return the bands of an image as float32 (bands, height, width), the best layout for NumPy."""
    return np.stack([np.asarray(band, dtype=np.float32) for band in image.split()])


def _over(scene: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Put a layer (4, 224, 224) over a scene (3, 224, 224).

    The bands of the layer are colour times coverage, then coverage (0..255).
    """
    return scene * (1 - layer[3] / 255) + layer[:3]


def _noise(rng, cells_x: int, cells_y: int) -> np.ndarray:
    """Return smooth noise, float32 (224, 224), interpolated from `cells_x` x `cells_y` values.

    Its mean is about 0 and its standard deviation below 1.
    """
    grid = Image.fromarray(rng.standard_normal((cells_y, cells_x), dtype=np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _tint(rng, palette: tuple) -> tuple[int, int, int, int]:
    """Return a slightly altered colour of the palette, and 255 for full coverage."""
    colour = (
        np.array(ImageColor.getrgb(palette[rng.integers(len(palette))]))
        + rng.normal(0, 12)
        + rng.normal(0, 6, 3)
    )
    return (*np.clip(colour, 0, 255).astype(int).tolist(), 255)


def _shift(point, x: float, y: float) -> np.ndarray:
    return np.array((point[0] + x, point[1] + y))


def _ellipse(centre, radii, rng=None, rough: float = 0.0) -> np.ndarray:
    """Return points (48, 2) around an ellipse.

    Every second point moves out by about `rough` radii, like tufts of fur.
    """
    swell = (
        1 + rough * np.abs(rng.standard_normal((48, 1))) * (np.arange(48) % 2)[:, None]
        if rough
        else 1.0
    )
    return np.asarray(centre) + CIRCLE * np.asarray(radii) * swell


def _curve(a, b, c) -> np.ndarray:
    """Return points (14, 2) of the quadratic Bezier curve with control points `a`, `b` and `c`."""
    t = STEPS[:, None]
    return (1 - t) ** 2 * np.asarray(a) + 2 * t * (1 - t) * np.asarray(b) + t**2 * np.asarray(c)


def _ribbon(line: np.ndarray, half_width) -> np.ndarray:
    """Return the outline (2n, 2) of a band along `line` (n, 2).

    The band extends by `half_width`, (n,) or a number, to either side.
    """
    along = np.diff(line, axis=0, prepend=2 * line[:1] - line[1:2])
    side = np.stack([-along[:, 1], along[:, 0]], 1)
    side *= (half_width / np.sqrt((side**2).sum(1) + 1e-12))[:, None]
    return np.concatenate([line + side, (line - side)[::-1]])


def _fill(pen: ImageDraw.ImageDraw, points: np.ndarray, fill) -> None:
    pen.polygon(points.ravel().tolist(), fill=fill)


def _background(rng) -> np.ndarray:
    """Return a wall and a floor with clutter and texture, float32 (3, 224, 224)."""
    image = Image.new("RGB", (FULL, FULL), _tint(rng, WALLS))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 10)):
        _thing(rng, pen, rng.uniform(0, FULL, 2), rng.uniform(15, 100))
    left, right = rng.uniform(0.4, 1.1) * FULL + rng.normal(0, 15, 2)
    _fill(pen, np.array([(0, left), (FULL, right), (FULL, FULL), (0, FULL)]), _tint(rng, FLOORS))
    for _ in range(rng.integers(0, 5)):
        _thing(
            rng, pen, (rng.uniform(0, FULL), rng.uniform(min(left, 400), FULL)), rng.uniform(10, 60)
        )
    if rng.random() < 0.5:  # out of focus
        image = image.reduce(int(rng.choice([7, 14, 28]))).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
    else:
        image = image.reduce(2)
    grain = _noise(rng, *rng.integers(4, 100, 2))
    return _planes(image) + rng.uniform(0, 14) * grain + rng.uniform(5, 25) * _noise(rng, 4, 4)


def _thing(rng, pen: ImageDraw.ImageDraw, at, size: float) -> None:
    """Draw an object: a ball, a framed picture, a flower, a leaf, a triangle or a stick."""
    kind = rng.choice(["ball", "picture", "flower", "leaf", "triangle", "stick"])
    colour, other, turn = _tint(rng, TOYS), _tint(rng, TOYS), rng.uniform(0, 2 * math.pi)
    ahead = size * np.array([math.cos(turn), math.sin(turn)])
    if kind == "ball":
        _fill(pen, _ellipse(at, (0.7 * size, 0.7 * size)), colour)
        _fill(
            pen, _ellipse(_shift(at, -0.25 * size, -0.25 * size), (0.2 * size, 0.14 * size)), other
        )
    elif kind == "picture":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * size * rng.uniform(0.4, 0.9, 2)
        _fill(pen, at + corners, colour)
        _fill(pen, at + 0.8 * corners, other)
    elif kind == "flower":
        petals = 1 + 0.35 * np.cos(rng.integers(4, 8) * (ROUND + turn))
        _fill(pen, at + 0.6 * size * CIRCLE * petals[:, None], colour)
        _fill(pen, _ellipse(at, (0.2 * size, 0.2 * size)), other)
    elif kind == "leaf":
        vein = _curve(at - ahead, at + 0.3 * ahead[::-1], at + ahead)
        _fill(pen, _ribbon(vein, 0.4 * size * np.sin(np.pi * STEPS)), colour)
    elif kind == "triangle":
        _fill(pen, at + 0.8 * np.array([ahead, ahead[::-1] * (1, -1), -ahead]), colour)
    else:
        _fill(pen, _ribbon(_curve(at - 3 * ahead, at, at + 3 * ahead), 0.12 * size), colour)


def _occlude(rng, layer: Image.Image) -> None:
    """Hide parts of the animal behind a few things, behind grass from below, or not at all."""
    pen = ImageDraw.Draw(layer)
    if rng.random() < 0.45:
        for _ in range(rng.integers(1, 4)):
            _thing(rng, pen, rng.uniform(0, FULL, 2), rng.uniform(20, 65))
    if rng.random() < 0.25:
        height, colour = rng.uniform(40, 190), _tint(rng, FLOORS[:1])
        for x in rng.uniform(0, FULL, rng.integers(8, 28)):
            tip = (x + rng.normal(0, 40), FULL - height * rng.uniform(0.5, 1.2))
            _fill(
                pen,
                _ribbon(_curve((x, FULL), (x, FULL - height / 2), tip), 6 - 5.5 * STEPS),
                colour,
            )


class Animal:
    """One animal on two canvases (448, 448), unpainted where zero.

    `fur` has no colours yet: its bands are coverage, shade, and the amount of the coat's second
    colour. `detail` (eyes, nose, whiskers) holds colour and coverage. Its mode is RGBX because
    Pillow would undo the product of the two in RGBA.
    """

    def __init__(self, rng, label: int):
        self.rng = rng
        lost = rng.random(len(CUES)) < CUE_LOST
        typical = np.clip(rng.normal(CUE_MEAN[label], CUE_SPREAD, len(CUES)), 0, 1)
        value = np.where(lost, rng.random(len(CUES)), typical)
        self.cue = dict(zip(CUES, value.tolist(), strict=True))
        self.fur, self.detail = Image.new("RGB", (FULL, FULL)), Image.new("RGBX", (FULL, FULL))
        self.fur_pen, self.detail_pen = ImageDraw.Draw(self.fur), ImageDraw.Draw(self.detail)

        self.pose = rng.choice(["sit", "stand", "lie"], p=[0.5, 0.3, 0.2])
        sits = self.pose == "sit"
        self.radius = 2 * (rng.uniform(36, 70) if sits else rng.uniform(32, 54))
        self.flip = rng.choice([-1, 1])
        across = rng.uniform(0.3, 0.7) if sits else 0.5 - self.flip * rng.uniform(-0.05, 0.3)
        self.at = np.array([across, rng.uniform(0.24, 0.52)]) * FULL
        self.tilt = rng.normal(0, 0.2)
        self.yaw, self.pitch = np.clip(rng.normal(0, 0.4), -0.7, 0.7), rng.normal(0.03, 0.08)
        self.rough = rng.uniform(0.0, 0.06)
        # First (0) or second coat colour of muzzle, chest, paws and ears.
        self.marks = rng.choice([0, 255], 4).tolist()
        self._body()
        self._head()

    def _place(self, points: np.ndarray, tilt: float) -> np.ndarray:
        """Return the canvas positions of `points`, turned by `tilt` radians.

        The points are relative to the head's middle, in head radii.
        """
        c, s = math.cos(tilt), math.sin(tilt)
        turn = np.array([(self.flip * c, self.flip * s), (-s, c)])
        return self.at + self.radius * (points @ turn)

    def _ink(self, points: np.ndarray, fill: tuple) -> None:
        """Draw a detail of the face."""
        _fill(self.detail_pen, self._place(points, self.tilt), fill)

    def _coat(self, parts: list, shade: float, mark: int = 0, tilt: float = 0.0) -> None:
        """Paint parts of the coat as one round shape: dark rims, then smaller, lighter middles."""
        parts = [self._place(part, tilt) for part in parts]
        for size, light in ((1.0, 0.65), (0.94, 0.88), (0.75, 0.96), (0.5, 1.02)):
            for part in parts:
                middle = part.mean(axis=0) - 0.08 * self.radius * (1 - size)
                _fill(
                    self.fur_pen,
                    middle + (part - middle) * size,
                    (255, int(LIT * shade * light), mark),
                )

    def _body(self) -> None:
        """Draw shadow, tail, trunk and legs in the animal's pose."""
        rng, rough, chest, paws = self.rng, self.rough, self.marks[1], self.marks[2]
        stout, leg = rng.uniform(0.85, 1.2), rng.uniform(0.15, 0.24)
        if self.pose == "sit":
            rump, floor, feet = np.array([0.8, 2.1]), rng.uniform(2.7, 3.1), (-0.4, 0.3)
            trunk = [((0.3, 2.05), (0.95 * stout, 1.0)), ((0.0, 1.35), (0.72 * stout, 1.0))]
        elif self.pose == "stand":
            rump, floor, feet = np.array([2.8, 0.9]), rng.uniform(2.2, 2.7), (2.3, 2.75, 0.1, 0.6)
            trunk = [((1.5, 1.15), (1.5, 0.62 * stout)), ((0.2, 1.0), (0.68, 0.75))]
        else:
            rump, floor, feet = np.array([2.4, 1.3]), 1.65, (-0.6, 0.35)
            trunk = [((1.3, 1.0), (1.4, 0.75 * stout)), ((0.1, 0.95), (0.75, 0.7))]
        shadow = _ellipse((rump[0] / 2, floor), (1.0 + rump[0] / 2, 0.22))
        _fill(self.fur_pen, self._place(shadow, 0.0), (90, 0, 0))
        self._tail(rump)
        for (centre, radii), shade, mark in zip(trunk, (0.86, 0.91), (0, chest), strict=True):
            self._coat([_ellipse(centre, radii, rng, rough)], shade, mark)
        for x in feet:
            line = _curve(
                (x * 0.9, 1.25), (x + rng.normal(0, 0.12), (floor + 1.25) / 2), (x, floor)
            )
            self._coat([_ribbon(line, leg * np.sqrt(np.minimum(1, 0.1 + 4 * STEPS)))], 0.95)
            self._coat([_ellipse((x - 0.05, floor), (leg * 1.35, leg * 0.85))], 1.0, paws)

    def _tail(self, rump: np.ndarray) -> None:
        """Draw the tail: long and even for a cat; short, thick at the root, tapered for a dog."""
        dog, rng = self.cue["tail"], self.rng
        bend = _shift(rump, rng.uniform(0.6, 1.1) * (1.6 - dog), rng.uniform(-0.3, 0.6))
        tip = _shift(rump, rng.uniform(0.3, 1.2), -rng.uniform(0.5, 1.1) - 0.7 * (1 - dog))
        width = (0.14 + 0.12 * dog) * (1 - 0.7 * dog * STEPS) * np.sqrt(1.02 - STEPS**6)
        self._coat([_ribbon(_curve(rump, bend, tip), width)], 0.85)

    def _head(self) -> None:
        """Draw the head from back to front; only upright ears are behind the skull."""
        hang, dog = self.cue["flop"] > 0.4, self.cue["skull"]
        if not hang:
            self._ears()
        skull = _ellipse((0, 0), (1.08 - 0.18 * dog, 0.84 + 0.14 * dog), self.rng, self.rough)
        self._coat([skull], 1.0, 0, self.tilt)
        tip = self._muzzle()
        self._mouth(tip)
        self._nose(_shift(tip, 0, -0.12))
        if hang:
            self._ears()
        self._eyes()
        self._whiskers(tip)
        if self.rng.random() < 0.25:
            collar = _ribbon(_curve((-0.6, 0.85), (0, 1.4), (0.6, 0.85)), 0.09)
            self._ink(collar, _tint(self.rng, TOYS))

    def _ears(self) -> None:
        """Draw the ears, from upright triangles to long round flaps.

        An ear leaves the head outwards and bends down by the cue "flop".
        """
        flop, rounded = self.cue["flop"], self.cue["ear_round"]
        length = (0.8 + 0.4 * self.cue["ear_length"] + 0.2 * flop) * self.rng.uniform(0.85, 1.15)
        flap = (0.22 + 0.2 * np.sin(np.pi * STEPS)) * np.sqrt(1 - STEPS**5)
        width = (1 - rounded) * 0.46 * (1 - STEPS) + rounded * flap
        for side in (-1, 1):
            angle = np.radians(
                12 + 75 * flop + (120 * flop + self.rng.normal(0, 8)) * np.minimum(1, 2 * STEPS)
            )
            step = np.stack([side * np.sin(angle), -np.cos(angle)], 1) * length / 14
            root = (side * (0.62 + 0.1 * flop) + 0.2 * np.sin(self.yaw), -0.5 - 0.05 * flop)
            line = root + np.cumsum(step, axis=0)
            self._coat([_ribbon(line, width)], 0.94 - 0.14 * flop, self.marks[3], self.tilt)
            if flop <= 0.4:  # the inside shows
                inside = _ribbon(line[2:-2], width[2:-2] * 0.55)
                _fill(self.fur_pen, self._place(inside, self.tilt), (255, 125, 160))

    def _face(self, longitude: float, height: float) -> np.ndarray:
        """Return the position, in head radii, of a point of the face on the turned head."""
        return np.array(
            [(1.05 - 0.16 * self.cue["skull"]) * np.sin(longitude + self.yaw), height + self.pitch]
        )

    def _muzzle(self) -> np.ndarray:
        """Draw the muzzle, from a cat's small pad to a long snout, and return its tip.

        A snout sticks out to the side when the head is turned.
        """
        dog = self.cue["muzzle"]
        base = self._face(0, 0.3)
        tip = _shift(base, 0.95 * dog * np.sin(self.yaw), 0.04 + 0.3 * dog)
        radii = np.array([0.46, 0.33 + 0.1 * dog])
        pads = [_ellipse(base + (tip - base) * t, radii * (1 - 0.22 * t)) for t in (0, 0.5, 1)]
        self._coat(pads, 1.04, self.marks[0], self.tilt)
        return tip

    def _nose(self, at: np.ndarray) -> None:
        """Draw the nose, from a small triangle pointing down to a large oval."""
        dog = self.cue["nose"]
        wide = (0.11 + 0.14 * dog) * self.rng.uniform(0.85, 1.15)
        nose = _ellipse((0, 0), (wide, 0.72 * wide))
        nose[:, 0] *= 1 - (1 - dog) * 0.75 * np.clip(nose[:, 1] / (0.72 * wide) + 0.3, 0, 1)
        self._ink(at + nose, DARK if self.rng.random() < 0.6 else PINK)
        self._ink(_ellipse(_shift(at, -0.3 * wide, -0.3 * wide), (wide * 0.25, wide * 0.15)), LIGHT)

    def _mouth(self, tip: np.ndarray) -> None:
        """Draw the mouth below the muzzle's tip, sometimes with the tongue out."""
        if self.rng.random() < 0.15 + 0.25 * self.cue["muzzle"]:
            self._ink(_ellipse(_shift(tip, 0.02, 0.3), (0.12, 0.2)), PINK)
        for side in (-1, 1):
            self._ink(
                _ribbon(
                    _curve(tip, _shift(tip, 0.02 * side, 0.3), _shift(tip, 0.26 * side, 0.17)),
                    0.018,
                ),
                DARK,
            )

    def _whiskers(self, tip: np.ndarray) -> None:
        """Draw three whiskers on each side, long for a cat, short or none for a dog."""
        length = 1.15 * (1 - self.cue["whiskers"]) - 0.2
        if length < 0.1:
            return
        fill = LIGHT if self.rng.random() < 0.6 else DARK
        for side in (-1, 1):
            for slope in self.rng.normal((-0.2, 0.0, 0.2), 0.04):
                a = _shift(tip, side * 0.2, 0.05 + 0.3 * slope)
                hair = _curve(
                    a,
                    _shift(a, side * 0.5 * length, 0.2 * slope),
                    _shift(a, side * length, slope * length),
                )
                self._ink(_ribbon(hair, 0.016 - 0.01 * STEPS), fill)

    def _eyes(self) -> None:
        """Draw the eyes: large, slanted, with slit pupils, to small, level, with round pupils."""
        rng, dog = self.rng, self.cue["eye"]
        size = (0.25 - 0.06 * dog) * rng.uniform(0.88, 1.12)
        slit = 0.2 + 0.55 * self.cue["pupil"]
        iris, closed, glance = _tint(rng, IRISES), rng.random() < 0.08, rng.normal(0, 0.03)
        for side in (-1, 1):
            at = self._face(side * 0.46, -0.12)
            if closed:
                lid = _curve(_shift(at, -size, 0), _shift(at, 0, size * 1.2), _shift(at, size, 0))
                self._ink(_ribbon(lid, 0.025), DARK)
                continue
            wide = size * np.cos(side * 0.46 + self.yaw)  # the far eye appears narrower
            for grow, fill in ((1.18, DARK), (1.0, iris)):
                ball = _ellipse((0, 0), (wide * grow, 0.9 * size * grow))
                ball[:, 1] -= side * ball[:, 0] * 0.35 * (1 - dog)
                self._ink(at + ball, fill)
            self._ink(_ellipse(_shift(at, glance, 0), (wide * slit, 0.76 * size)), DARK)
            self._ink(
                _ellipse(_shift(at, glance - 0.25 * size, -0.3 * size), (0.2 * size, 0.2 * size)),
                LIGHT,
            )


def _fur(rng, layer: Image.Image) -> np.ndarray:
    """Return the fur with colours, pattern and hairs, as a layer for `_over`."""
    cover, shade, mark = _planes(layer.reduce(2))
    first, second = (np.array(_tint(rng, COATS)[:3], np.float32)[:, None, None] for _ in range(2))
    pattern = rng.choice(["plain", "patches", "stripes", "spots"])
    weight = mark / np.maximum(cover, 1)
    if pattern == "patches":
        weight = np.maximum(weight, np.clip(4 * _noise(rng, 6, 6) - 0.5, 0, 1))
    elif pattern == "spots":
        weight = np.maximum(weight, np.clip(4 * _noise(rng, 22, 22) - 2, 0, 1))
    elif pattern == "stripes":
        turn, density = rng.uniform(0, math.pi), rng.uniform(55, 110)
        phase = density * (math.cos(turn) * X + math.sin(turn) * Y) + 2.5 * _noise(rng, 7, 7)
        weight = np.maximum(weight, np.clip(1.5 * np.sin(phase), 0, 1) * rng.uniform(0.4, 0.9))
    hairs = rng.uniform(2, 9) * _noise(rng, 90, 40) + 5 * _noise(rng, 8, 8)
    colour = (first + (second - first) * weight + hairs) * (shade / LIT)
    return np.concatenate([colour, cover[None]])


def _photograph(rng, scene: np.ndarray) -> np.ndarray:
    """Return a photograph of the scene, uint8 (224, 224, 3): light, cast, contrast, blur, grain."""
    turn = rng.uniform(0, 2 * math.pi)
    light = (
        1
        + rng.uniform(0, 0.5) * (math.cos(turn) * X + math.sin(turn) * Y)
        - rng.uniform(0, 0.6) * (X * X + Y * Y)
    )
    cast = rng.normal(1, 0.05, (3, 1, 1)).astype(np.float32)
    scene = (scene * cast * light - 120) * rng.uniform(0.65, 1.1) + rng.uniform(95, 150)
    bands = [Image.fromarray(band) for band in np.clip(scene, 0, 255).astype(np.uint8)]
    if rng.random() < 0.4:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3))
        bands = [band.filter(blur) for band in bands]
    grain = rng.uniform(1, 9) * rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    return np.stack(
        [np.clip(np.asarray(band) + grain, 0, 255).astype(np.uint8) for band in bands], 2
    )
