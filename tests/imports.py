"""What commands import, imported once: see ``tests/commands.py``."""

import distributed
import torch.utils.tensorboard
import torchvision

import featurestore.caching.planning
import featurestore.caching.repair
import featurestore.caching.run
import featurestore.checkpoints.convert
import featurestore.checkpoints.download
import featurestore.demo.dataset
import featurestore.demo.olivetti
import featurestore.networks.external
import featurestore.photos.detection
import featurestore.queries.answers
import featurestore.queries.identification
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
import pipelines.store_info
import pipelines.train_heads
import pipelines.verify_store

__all__ = ["distributed", "featurestore", "heads", "pipelines", "torch", "torchvision"]
