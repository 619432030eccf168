"""All options of the network and of the commands, and the presets.

Imports neither torch nor diffusers, so that `lamamba --help` answers at once.
"""

from lamamba.config.checks import closest as closest
from lamamba.config.checks import nearest as nearest
from lamamba.config.data import WHOLE_DATASET as WHOLE_DATASET
from lamamba.config.data import DatasetOptions as DatasetOptions
from lamamba.config.data import EncodeConfig as EncodeConfig
from lamamba.config.data import PrepareEmojiConfig as PrepareEmojiConfig
from lamamba.config.data import PrepareImagenetConfig as PrepareImagenetConfig
from lamamba.config.network import PRESETS as PRESETS
from lamamba.config.network import SIXTEEN_STATES as SIXTEEN_STATES
from lamamba.config.network import NetworkConfig as NetworkConfig
from lamamba.config.network import preset as preset
from lamamba.config.options import Option as Option
from lamamba.config.options import OptionReader as OptionReader
from lamamba.config.planning import InfoConfig as InfoConfig
from lamamba.config.planning import PlanConfig as PlanConfig
from lamamba.config.publishing import ConvertConfig as ConvertConfig
from lamamba.config.publishing import PushConfig as PushConfig
from lamamba.config.sampling import PLAIN_GUIDANCE as PLAIN_GUIDANCE
from lamamba.config.sampling import DemoConfig as DemoConfig
from lamamba.config.sampling import DemoLimits as DemoLimits
from lamamba.config.sampling import EvaluateConfig as EvaluateConfig
from lamamba.config.sampling import GenerateConfig as GenerateConfig
from lamamba.config.sampling import GuidanceOptions as GuidanceOptions
from lamamba.config.sampling import SampleConfig as SampleConfig
from lamamba.config.sampling import Sampler as Sampler
from lamamba.config.sampling import SamplingConfig as SamplingConfig
from lamamba.config.tools import DoctorConfig as DoctorConfig
from lamamba.config.tools import GridConfig as GridConfig
from lamamba.config.tools import PlotConfig as PlotConfig
from lamamba.config.training import AverageConfig as AverageConfig
from lamamba.config.training import FinetuneConfig as FinetuneConfig
from lamamba.config.training import Timesteps as Timesteps
from lamamba.config.training import TrainConfig as TrainConfig
from lamamba.config.training import WatchConfig as WatchConfig
