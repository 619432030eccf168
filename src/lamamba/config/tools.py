"""What looks at a machine, at runs and at pictures: `lamamba doctor`, `plot`, `grid`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorConfig:
    """Say what of lamamba works on this machine, what does not, and what would help; exit code 1 is a fault."""

    json: bool = False
    """Print JSON, an object for each line: name, state (ok, note or fault), says, mend."""
