"""Ship a hardened demo model: its tower in half precision, beside the weights of the original.

    hf-robust-vision harden sim-clip --output_dir outputs/sim-clip-demo
    python recipes/research/write_demo_twin.py outputs/sim-clip-demo demo-clip-hardened

    python recipes/research/compare_towers.py --name hardening-llava-8 --learning_rates 2e-3 --steps 900 \
        --features language_tokens+attack_step_size=5/255 --seeds 0
    python recipes/research/write_demo_twin.py FOLDER/seed0 demo-llava-hardened

The folder of the second is the one that `compare_towers.py` hardens into.
"""

from __future__ import annotations

import argparse

from hf_robust_vision.pipeline.twins import TWINS, write_twin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardened", help="folder of the demo CLIP after hardening")
    parser.add_argument("name", choices=sorted(TWINS), help="of the twin")
    args = parser.parse_args()
    print(write_twin(args.hardened, args.name))
