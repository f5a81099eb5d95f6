package imageservice

// Pin sets or takes away the pin of the image that ref means, and returns the image as
// it is then. The pin belongs to the image and not to its name: it is in the book, survives
// restarts, and stays with the image when a tag moves to another one. It ends with the
// image's removal. An image that matches Config.PinnedImages stays pinned in any case.
// Errors: those of Get.
func (s *Service) Pin(ref string, pinned bool) (Image, error) {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	id, err := s.view.Load().find(ref, *s.search.Load())
	if err != nil {
		return Image{}, err
	}
	if s.view.Load().rows[id].Pinned != pinned {
		err = s.commitLocked([]string{id}, func(_ string, old *imageRow) *imageRow {
			r := *old
			r.Pinned = pinned
			return &r
		}, nil)
	}
	return s.view.Load().images[id], err
}
