"""All options of the network and of the commands, and the presets.

Imports neither torch nor diffusers, so that `lamamba --help` answers at once.
"""

from lamamba.config.checks import closest, nearest
from lamamba.config.data import WHOLE_DATASET, DatasetOptions, EncodeConfig, PrepareEmojiConfig, PrepareImagenetConfig
from lamamba.config.network import PRESETS, SIXTEEN_STATES, NetworkConfig, preset
from lamamba.config.options import Option, OptionReader
from lamamba.config.sampling import (
    PLAIN_GUIDANCE,
    DemoConfig,
    DemoLimits,
    EvaluateConfig,
    GenerateConfig,
    GuidanceOptions,
    SampleConfig,
    Sampler,
    SamplingConfig,
)
from lamamba.config.tools import (
    ConvertConfig,
    DoctorConfig,
    ExportConfig,
    GridConfig,
    InfoConfig,
    PlanConfig,
    PlotConfig,
    PushConfig,
)
from lamamba.config.training import (
    AverageConfig,
    DistillationOptions,
    DistillConfig,
    FinetuneConfig,
    Timesteps,
    TrainConfig,
    WatchConfig,
)
