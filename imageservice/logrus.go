package imageservice

import (
	"io"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// containers/image logs through logrus's global logger, unstructured and to standard
// error. What it says is of use to whoever looks for the cause of an error that it
// returns as well, so it goes to klog, at the level of steps.
func init() {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.InfoLevel)
	logrus.AddHook(toKlog{})
}

type toKlog struct{}

func (toKlog) Levels() []logrus.Level { return logrus.AllLevels }

func (toKlog) Fire(e *logrus.Entry) error {
	klog.Background().V(4).Info("Image library", "level", e.Level.String(), "message", e.Message)
	return nil
}
