"""Raw inputs become the folder that the animate model is given: a video of a person and a picture of another one.

    driving video --detectors.py--> 133 points a frame --retarget.py--> --drawing.py--> src_pose.mp4
                  --crops.py (the face)---------------------------------------------->  src_face.mp4
                  --sam2.py or a mask video--> masks.py ----------->  src_mask.mp4, src_bg.mp4

The networks are optional: points and masks may come from files (`keypoints.py`, `--mask-video`), everything after them
is the same.  `animate.py` is the flow from one end to the other.
"""
