"""One colour-blind-safe palette for the whole suite: a colour means the same thing in every figure.

The five colours stay apart (CIELAB distance above 15) for normal vision and for simulated deuteranopia, protanopia and
tritanopia (matrices of Machado et al. 2009), and all reach a contrast of 3:1 on white; tests/teach holds both.
"""

ORIGINAL = "#0B5FA5"  # full-precision numbers: the weights as they came
QUANTIZED = "#CC6A00"  # what the stored codes stand for: levels, dequantized weights
ERROR = "#6A0F49"  # the difference between the two
ADAPTER = "#12A17A"  # what trains beside the frozen weights: LoRA and its relatives
NEUTRAL = "#5F5F5F"  # references, limits, everything that is none of the above

INK = "#1A1A1A"
GRID = "#D9D9D9"

ROLES = {"original": ORIGINAL, "quantized": QUANTIZED, "error": ERROR, "adapter": ADAPTER, "neutral": NEUTRAL}


def colour(role):
    """Hex colour of a role; raises ValueError that lists the roles."""
    if role not in ROLES:
        raise ValueError(f"no colour has the role {role!r}; the roles are {', '.join(ROLES)}")
    return ROLES[role]
