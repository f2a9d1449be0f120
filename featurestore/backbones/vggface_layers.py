"""VGG-Face's plan and its 38 published layer names, without torch.

Parkhi, Vedaldi & Zisserman, "Deep Face Recognition", 2015: five blocks of 3×3 convolutions, three linear layers.
"""

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, width
CEIL_MODE_BLOCK = 3
LINEAR = (("fc6", 512 * 7 * 7, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 2622))


def _module_paths() -> dict[str, str]:
    paths = {}
    for block, (convolutions, _) in enumerate(BLOCKS, start=1):
        for i in range(1, convolutions + 1):
            for kind in ("conv", "relu"):
                paths[f"{kind}_{block}_{i}"] = f"features.{kind}_{block}_{i}"
        paths[f"maxp_{block}_{convolutions}"] = f"features.maxp_{block}_{convolutions}"
    for name, _, _ in LINEAR:
        tails = ("", "-relu", "-dropout") if name != "fc8" else ("",)
        for tail in tails:
            paths[name + tail] = f"fc.{name}{tail}"
    return paths


MODULE_PATHS: dict[str, str] = _module_paths()
SAME_IN_EVAL = frozenset(frozenset({f"{fc}-relu", f"{fc}-dropout"}) for fc in ("fc6", "fc7"))
