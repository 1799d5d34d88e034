"""UPerNet on agent_swin_small, ADE20K; agents on grids of 9, 12, 14 and 7.

vizattn train segmentation/upernet_agent_swin_small --data ADEChallengeData2016
Published (arXiv:2312.08874): mIoU 48.08 at one scale. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="agent_swin_small", pretrained=True, num_agents=[81, 144, 196, 49], drop_path_rate=0.2)
