"""The denoiser of `sure_denoise_digits`, told the clean digits: what they are worth.

    make train EXP=clean_denoise_digits

Cost: minutes on 2 idle CPU cores.
"""

from dataclasses import replace

from experiments import sure_denoise_digits

CONFIG = replace(sure_denoise_digits.CONFIG, objective="clean")
