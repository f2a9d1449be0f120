"""What commands import, imported once: see ``tests/commands.py``."""

import distributed
import torch._dynamo  # as the first optimiser of a process does
import torch.utils.tensorboard
import torchvision

import featurestore.caching.planning
import featurestore.caching.repair
import featurestore.caching.run
import featurestore.checkpoints.convert
import featurestore.checkpoints.download
import featurestore.demo.dataset
import featurestore.demo.olivetti
import featurestore.figures.curves
import featurestore.figures.matrices
import featurestore.figures.sheets
import featurestore.networks.external
import featurestore.photos.detection
import featurestore.queries.answers
import featurestore.queries.exporting
import featurestore.queries.identification
import featurestore.queries.layer_comparison
import featurestore.queries.layer_statistics
import featurestore.queries.nearest
import featurestore.queries.output
import featurestore.queries.similarity_analysis
import featurestore.queries.units
import featurestore.queries.verification
import featurestore.queries.view_invariance
import featurestore.store.importing
import featurestore.store.lazy
import featurestore.store.removal
import featurestore.store.rewriting
import featurestore.store.summary
import heads.describe
import heads.network_table
import heads.runs_table
import heads.schedule
import pipelines.cache_layers
import pipelines.compare_networks
import pipelines.convert_weights
import pipelines.fetch_olivetti
import pipelines.find_faces
import pipelines.make_faces
import pipelines.name_faces
import pipelines.query_layers
import pipelines.store_info
import pipelines.train_heads
import pipelines.verify_store

__all__ = ["distributed", "featurestore", "heads", "pipelines", "torch", "torchvision"]
