"""The denoiser of `sure_denoise_digits`, trained on clean digits by squared error, for comparison.

    make train EXP=clean_denoise_digits

Cost: minutes on 2 idle CPU cores. Expected: 19.2 dB PSNR on the test digits (docs/results.md).
"""

from dataclasses import replace

from . import sure_denoise_digits

CONFIG = replace(sure_denoise_digits.CONFIG, objective="clean")
