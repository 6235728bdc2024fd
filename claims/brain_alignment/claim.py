"FILL IN: the experiment of brain_alignment"

def run(arm, rate, seed, split, steps) -> dict:
    "Numbers by name; all is drawn from `seed`, and questions of `split` ('validation' or 'test') alone are asked"
    raise NotImplementedError('FILL IN')

def identities() -> dict[str, bool]:
    "What must be exact"
    return {}
