"""ExecuTorch's exporter, told to give XNNPACK all that it can compute.

`xnnpack.write` imports this module only when it is needed: the exporter takes 3 s to import.
"""

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import HardswishConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch.export import ExportedProgram


class IntegerHardswish(HardswishConfig):
    """Hardswish on integers, by a table of 256. XNNPACK has it; ExecuTorch does not ask for it."""

    def supported_precision_types(self):
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]


def serialized(program: ExportedProgram) -> bytes:
    """Return an exported network as the ExecuTorch program that XNNPACK runs."""
    configs = [
        IntegerHardswish if config is HardswishConfig else config
        for config in ALL_PARTITIONER_CONFIGS
    ]
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=configs)])
    # Otherwise, memory for an input of the largest batch would be reserved at every batch size, and
    # each input would be copied there.
    memory = MemoryPlanningPass(alloc_graph_input=False)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=memory)).buffer
