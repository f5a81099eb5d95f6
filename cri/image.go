package cri

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/imageservice"
)

func (s *imageService) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	if err := s.checkImage(r.GetImage()); err != nil {
		return nil, err
	}
	if err := checkAuth(r.GetAuth()); err != nil {
		return nil, err
	}
	img, err := s.deps.Images.Pull(ctx, r.GetImage().GetImage(), fromAuth(r.GetAuth()))
	if err != nil {
		return nil, err
	}
	return &runtime.PullImageResponse{ImageRef: img.ID}, nil
}

func (s *imageService) ListImages(_ context.Context, r *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	images := s.deps.Images.List()
	if ref := r.GetFilter().GetImage().GetImage(); ref != "" {
		img, err := s.deps.Images.Get(ref)
		switch {
		case errors.Is(err, imageservice.ErrNotFound):
			images = nil
		case err != nil:
			return nil, err
		default:
			images = []imageservice.Image{img}
		}
	}
	resp := &runtime.ListImagesResponse{Images: make([]*runtime.Image, 0, len(images))}
	for i := range images {
		resp.Images = append(resp.Images, toImage(&images[i]))
	}
	return resp, nil
}

func (s *imageService) ImageStatus(_ context.Context, r *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	if err := s.checkImage(r.GetImage()); err != nil {
		return nil, err
	}
	img, err := s.deps.Images.Get(r.GetImage().GetImage())
	if errors.Is(err, imageservice.ErrNotFound) {
		return &runtime.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtime.ImageStatusResponse{Image: toImage(&img)}
	resp.Image.Spec.UserSpecifiedImage = r.GetImage().GetUserSpecifiedImage()
	if r.GetVerbose() {
		resp.Info, err = imageInfo(&img)
	}
	return resp, err
}

func (s *imageService) RemoveImage(ctx context.Context, r *runtime.RemoveImageRequest) (*runtime.RemoveImageResponse, error) {
	if err := s.checkImage(r.GetImage()); err != nil {
		return nil, err
	}
	err := ignore(s.deps.Images.Remove(ctx, r.GetImage().GetImage()), imageservice.ErrNotFound)
	return &runtime.RemoveImageResponse{}, err
}

func (s *imageService) ImageFsInfo(context.Context, *runtime.ImageFsInfoRequest) (*runtime.ImageFsInfoResponse, error) {
	u, err := s.deps.Images.FsUsage()
	if err != nil {
		return nil, err
	}
	// Where images and writable layers are on one file system, the interface wants
	// the list of container file systems empty.
	resp := &runtime.ImageFsInfoResponse{ImageFilesystems: []*runtime.FilesystemUsage{toFsUsage(&u)}}
	if u.Writable != nil {
		resp.ContainerFilesystems = []*runtime.FilesystemUsage{toFsUsage(u.Writable)}
	}
	return resp, nil
}

func toFsUsage(u *imageservice.FsUsage) *runtime.FilesystemUsage {
	return &runtime.FilesystemUsage{
		Timestamp:  u.At.UnixNano(),
		FsId:       &runtime.FilesystemIdentifier{Mountpoint: u.Mountpoint},
		UsedBytes:  &runtime.UInt64Value{Value: u.Bytes},
		InodesUsed: &runtime.UInt64Value{Value: u.Inodes},
	}
}

// fromAuth is nil when there is nothing to authenticate with, so that the
// node's own credentials are used.
func fromAuth(a *runtime.AuthConfig) *imageservice.Auth {
	auth := imageservice.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(),
		ServerAddress: a.GetServerAddress(), IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
	if auth == (imageservice.Auth{ServerAddress: auth.ServerAddress}) {
		return nil
	}
	return &auth
}

// toImage is an image as the interface shows it.
func toImage(img *imageservice.Image) *runtime.Image {
	out := &runtime.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        img.Size,
		Spec:        &runtime.ImageSpec{Image: img.ID},
		Pinned:      img.Pinned,
	}
	out.Uid, out.Username = imageUser(img.Config.User)
	return out
}

// imageUser is the user part of an image's "user[:group]": a number as an ID,
// anything else as a name, and neither if the image names none. The kubelet
// compares it with runAsNonRoot, so a number that no ID can have stays a name:
// it is refused there, where it would pass as an ID other than 0.
func imageUser(user string) (*runtime.Int64Value, string) {
	user, _, _ = strings.Cut(user, ":")
	if user == "" {
		return nil, ""
	}
	if strings.Trim(user, "0123456789") == "" {
		if id, err := strconv.ParseInt(user, 10, 64); err == nil && id <= maxID {
			return &runtime.Int64Value{Value: id}, ""
		}
	}
	return nil, user
}

// imageInfo is the verbose part of ImageStatus: one value under "info", with
// the image's configuration in the form of the OCI image specification, where
// crictl and others look for it.
func imageInfo(img *imageservice.Image) (map[string]string, error) {
	type config struct {
		User       string              `json:"User,omitempty"`
		Env        []string            `json:"Env,omitempty"`
		Entrypoint []string            `json:"Entrypoint,omitempty"`
		Cmd        []string            `json:"Cmd,omitempty"`
		Volumes    map[string]struct{} `json:"Volumes,omitempty"`
		WorkingDir string              `json:"WorkingDir,omitempty"`
		Labels     map[string]string   `json:"Labels,omitempty"`
		StopSignal string              `json:"StopSignal,omitempty"`
	}
	type spec struct {
		Created      time.Time `json:"created,omitzero"`
		Architecture string    `json:"architecture"`
		OS           string    `json:"os"`
		Config       config    `json:"config"`
	}
	c := img.Config
	b, err := json.Marshal(struct {
		ChainID string `json:"chainID"`
		Spec    spec   `json:"imageSpec"`
	}{img.ChainID, spec{img.Created, img.Architecture, img.OS, config{
		c.User, c.Env, c.Entrypoint, c.Cmd, c.Volumes, c.WorkingDir, c.Labels, c.StopSignal,
	}}})
	if err != nil {
		return nil, err
	}
	return map[string]string{"info": string(b)}, nil
}
