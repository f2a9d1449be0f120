"""The attribution methods by name, and what each shows. Nothing here loads torch."""

METHODS = {
    "grad-cam": "maps of a layer, weighted by mean gradients",
    "grad-cam++": "the same, by strong positive gradients",
    "hires-cam": "maps of a layer times their gradients, place by place",
    "lrp": "relevance by the gamma rule in convolutions, then epsilon",
    "lrp-epsilon": "relevance by the epsilon rule",
    "lrp-gamma": "relevance by the gamma rule",
    "lrp-alpha-beta": "relevance by alpha 2, beta 1 in convolutions",
    "guided-backprop": "input times gradient, by positive gradients at ReLUs",
    "input-x-gradient": "input times gradient",
    "integrated-gradients": "gradients on the way from the mean colour",
    "occlusion": "what a window of the mean colour takes away",
}
