"""Names of the records that lie beside a model's weights, and tell how it was made."""

from __future__ import annotations


HARDEN_REPORT = "harden_report.json"  # of a VLM whose tower was hardened in place
SWAP_REPORT = "swap_report.json"  # of a VLM that was given another tower
INTERPOLATE_REPORT = "interpolate_report.json"  # of a model between two others
REPORTS = (HARDEN_REPORT, SWAP_REPORT, INTERPOLATE_REPORT)
