"""The picture of docs/op-profile.md: the embedded teacher, profiled now on this machine.

    python docs/make_op_profile_picture.py [--home mlruns] [--out docs/pictures/profile.png]

Exit codes are those of `paretune`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paretune.common.errors import ParetuneError
from paretune.objectives.profiler.run import ProfileRequest, local_profile_named, profile_ops
from paretune.teachers.checkpoint.teacher import EMBEDDED
from paretune.tracking.charts.op_profile_picture import profile_picture

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the picture of docs/op-profile.md.")
    parser.add_argument("--home", type=Path, default=Path("mlruns"))
    parser.add_argument("--profile", default="local-cpu")
    parser.add_argument("--out", type=Path, default=HERE / "pictures" / "profile.png")
    options = parser.parse_args(arguments)
    home = options.home.resolve()
    try:
        profile = local_profile_named(options.profile, home)
        found = profile_ops(EMBEDDED, ProfileRequest(profile, home, say=lambda text: print(text, file=sys.stderr)))
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    profile_picture(found, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
