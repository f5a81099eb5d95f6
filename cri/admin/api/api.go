// Package api is the language of berthd's admin socket: HTTP/1.1 and JSON over
// the unix socket <run_dir>/admin.sock, which only root may use.
//
// # Nouns
//
//   - path: each Path constant is one question; its comment names the method, what
//     is sent and what comes back.
//   - Record: one line of the answer to long work. Such an answer is
//     newline-delimited JSON: records of progress, then exactly one that is Done, with
//     an Error if the work failed. An answer that ends without it was cut off.
//   - Error: why something was not done, with a code to decide by and a text to show.
//
// # Caveats
//
//   - An answer to a question that failed at once has a status of 400 or above and
//     an Error as its body; work that has begun tells of its end in its last record.
//   - This is the interface of the command berth of the same release, not one for
//     other programs: fields are added, and unknown ones are ignored by both sides.
package api

import "time"

// The paths. "ref" is an image reference or ID.
const (
	PathVersion = "/v1/version"       // GET: Version
	PathConfig  = "/v1/config"        // GET: Config
	PathImages  = "/v1/images"        // GET: []Image; with ?ref= that one only
	PathRemove  = "/v1/images/remove" // POST RemoveRequest: Image
	PathPin     = "/v1/images/pin"    // POST PinRequest: Image
	PathPull    = "/v1/images/pull"   // POST PullRequest: records
	PathPulls   = "/v1/pulls"         // GET: []Pull
	PathOps     = "/v1/ops"           // GET: []Op
	PathExplain = "/v1/explain"       // GET ?ref=, and ?probe=1 to ask the registries: Plan
	// POST with ?path=, an absolute path as the client's process sees it, or without it
	// and the archive as the body; ?name=, ?pin=1: records.
	PathImport = "/v1/images/import"
	// GET ?ref=…&ref=…, &original=1: a tar archive, with TrailerError behind it.
	PathExport = "/v1/images/export"
	// POST VerifyRequest: records, each of them with a Layer, the last but one with a Summary.
	PathVerify = "/v1/images/verify"
	// POST InspectRequest: records with a Finding each.
	PathLeaks = "/v1/leaks"
	PathCheck = "/v1/check"
)

// TrailerError is the trailer of an export that tells, as the JSON of an Error, why it ends
// before it is complete. It is empty after one that is.
const TrailerError = "Berth-Error"

// Limits of what is sent, in bytes.
const (
	// MaxRequest bounds the body of a request, archives left out.
	MaxRequest = 1 << 20
	// MaxRecord bounds one line of an answer that is made of records.
	MaxRecord = 1 << 20
	// MaxAnswer bounds every other answer.
	MaxAnswer = 256 << 20
)

// Code tells kinds of errors apart.
type Code string

// The codes.
const (
	CodeInvalid      Code = "invalid"      // the request is wrong
	CodeNotFound     Code = "not-found"    // what it names is not there
	CodeConflict     Code = "conflict"     // the state forbids it
	CodeUnauthorized Code = "unauthorized" // a registry denied access
	CodeUnavailable  Code = "unavailable"  // a registry does not answer, or berthd is busy
	CodeDamaged      Code = "damaged"      // data is not what its digest says
	CodeTooLarge     Code = "too-large"    // a limit was passed
	CodeCancelled    Code = "cancelled"    // the caller went away or time was up
	CodeFailed       Code = "failed"       // anything else
)

// Error is why something was not done.
type Error struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Version identifies a running berthd.
type Version struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
}

// Config is the configuration in force, by key.
type Config struct {
	Values map[string]any `json:"values"`
	TOML   string         `json:"toml"` // the same as a file
}

// Image is an image of the node.
type Image struct {
	ID           string    `json:"id"`
	Tags         []string  `json:"tags"`
	Digests      []string  `json:"digests"`
	Size         uint64    `json:"size"` // bytes on disk, unpacked
	Pinned       bool      `json:"pinned"`
	Created      time.Time `json:"created,omitzero"`
	Pulled       time.Time `json:"pulled,omitzero"`
	OS           string    `json:"os,omitempty"`
	Architecture string    `json:"architecture,omitempty"`
	Variant      string    `json:"variant,omitempty"`
}

// RemoveRequest asks for the removal of an image, or of those of its names that Ref means.
type RemoveRequest struct {
	Ref   string `json:"ref"`
	Force bool   `json:"force,omitempty"` // also when it is pinned
}

// PinRequest sets or takes away the pin of an image.
type PinRequest struct {
	Ref    string `json:"ref"`
	Pinned bool   `json:"pinned"`
}

// PullRequest asks for an image from a registry.
type PullRequest struct {
	Ref      string `json:"ref"`
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
	Pin      bool   `json:"pin,omitempty"`
}

// Pull is a pull, or an import, that is running. Durations are in nanoseconds.
type Pull struct {
	Reference  string    `json:"reference"` // as the first caller wrote it
	Image      string    `json:"image"`     // the full name that is being tried
	Stage      string    `json:"stage"`     // such as "layers 3/8"
	Began      time.Time `json:"began"`
	StageAt    time.Time `json:"stageAt"`
	Waiters    int       `json:"waiters"`    // callers; 0 while nobody waits any more
	TotalBytes int64     `json:"totalBytes"` // of the layers that were not there, compressed; 0 if not known yet
	DoneBytes  int64     `json:"doneBytes"`
	Rate       int64     `json:"rate"`  // bytes per second, over the last seconds
	Limit      string    `json:"limit"` // what most of the time goes into: "network", "cpu", "disk"
	Layers     []Layer   `json:"layers"`
	Problem    string    `json:"problem"` // the last trouble that the pull got over
}

// Layer is one layer of a running pull.
type Layer struct {
	Digest     string        `json:"digest"`
	State      string        `json:"state"` // "waiting", "pulling", "committing", "done", "present"
	TotalBytes int64         `json:"totalBytes"`
	DoneBytes  int64         `json:"doneBytes"`
	Rate       int64         `json:"rate"`
	Endpoint   string        `json:"endpoint"` // host that sends it
	Retries    int           `json:"retries"`
	Shared     bool          `json:"shared"` // another pull makes it
	Network    time.Duration `json:"network"`
	CPU        time.Duration `json:"cpu"`
	Disk       time.Duration `json:"disk"`
	Problem    string        `json:"problem"`
}

// Op is something that berthd is doing. Durations are in nanoseconds and right whatever was
// done to the clock.
type Op struct {
	Kind   string `json:"kind"`             // one of the Kind constants
	What   string `json:"what"`             // "run pod"; of a call its method
	Object string `json:"object,omitempty"` // an ID, or the reference of an image
	Name   string `json:"name,omitempty"`   // "namespace/pod" or "namespace/pod/container"
	// Step is what is being done of it, such as "network" or "layers 3/8".
	Step    string        `json:"step,omitempty"`
	Began   time.Time     `json:"began,omitzero"`
	Age     time.Duration `json:"age"`
	StepAge time.Duration `json:"stepAge"` // of a call the same as Age
	// Waiters is the number of callers of an operation or pull, which goes on without any;
	// 0 for all else.
	Waiters int `json:"waiters"`
	// Call is the number of a call in berthd's log.
	Call string `json:"call,omitempty"`
}

// The kinds of what is under way.
const (
	KindCall       = "call"       // a CRI request that is not answered yet
	KindSession    = "session"    // a connection of exec, attach or port-forward
	KindOperation  = "operation"  // work on a pod or container, with steps
	KindPull       = "pull"       // of an image, or the import of an archive
	KindBackground = "background" // what nobody called for
	KindUnfinished = "unfinished" // by the book, while no berthd runs: the next one takes it up
)

// Plan is what a pull would try, in order.
type Plan struct {
	Reference  string      `json:"reference"`
	Candidates []Candidate `json:"candidates"`
	Registries string      `json:"registries"` // files of registries.conf
	Hosts      string      `json:"hosts"`      // directory of hosts.toml files
	Policy     string      `json:"policy"`     // signature policy; "" for none
}

// Candidate is a full name that a reference may mean.
type Candidate struct {
	Image     string     `json:"image"`
	Reason    string     `json:"reason"`
	Source    string     `json:"source"`
	Ignored   string     `json:"ignored,omitempty"`
	Error     string     `json:"error,omitempty"`
	Endpoints []Endpoint `json:"endpoints"`
}

// Endpoint is one place that would be asked.
type Endpoint struct {
	URL         string       `json:"url"`
	Repository  string       `json:"repository"`
	Mirror      bool         `json:"mirror"`
	Resolve     bool         `json:"resolve"` // asked what a tag means
	Pull        bool         `json:"pull"`    // asked for content
	Credentials string       `json:"credentials"`
	Username    string       `json:"username,omitempty"`
	CAFiles     []string     `json:"caFiles,omitempty"`
	ClientFiles []ClientPair `json:"clientFiles,omitempty"`
	SkipVerify  bool         `json:"skipVerify"`
	Headers     []string     `json:"headers,omitempty"`
	Proxy       string       `json:"proxy,omitempty"`
	Probe       *Probe       `json:"probe,omitempty"`
}

// ClientPair names the files of a client certificate.
type ClientPair struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

// Probe is what an endpoint answered.
type Probe struct {
	OK        bool          `json:"ok"`
	Took      time.Duration `json:"took"`
	Scheme    string        `json:"scheme,omitempty"`
	Auth      string        `json:"auth,omitempty"`
	Digest    string        `json:"digest,omitempty"`
	MediaType string        `json:"mediaType,omitempty"`
	Error     string        `json:"error,omitempty"`
}

// VerifyRequest asks whether layers are as they were unpacked.
type VerifyRequest struct {
	Refs   []string `json:"refs,omitempty"`   // none: all images
	Quick  bool     `json:"quick,omitempty"`  // do not read files
	Repair bool     `json:"repair,omitempty"` // make damaged layers anew
}

// LayerReport is what was found out about a layer.
type LayerReport struct {
	Image      string   `json:"image"` // ID of an image that needs it
	Number     int      `json:"number"`
	Of         int      `json:"of"`
	Digest     string   `json:"digest"`
	ChainID    string   `json:"chainID"`
	Entries    int64    `json:"entries"`
	Bytes      int64    `json:"bytes"`
	Damaged    bool     `json:"damaged"`
	Count      int64    `json:"count,omitempty"`      // of deviations
	Deviations []string `json:"deviations,omitempty"` // the first of them
	Repaired   bool     `json:"repaired,omitempty"`
}

// Summary is the end of a verification.
type Summary struct {
	Images   int   `json:"images"`
	Layers   int   `json:"layers"`
	Bytes    int64 `json:"bytes"`
	Damaged  int   `json:"damaged"`  // layers
	Repaired int   `json:"repaired"` // of them
}

// InspectRequest asks for a look at the node.
type InspectRequest struct {
	Mend bool `json:"mend,omitempty"` // put right what can be
}

// Finding is a thing that nobody owns, or something that is not as the book has it.
type Finding struct {
	Kind        string    `json:"kind"`
	ID          string    `json:"id,omitempty"`
	What        string    `json:"what,omitempty"` // a path, a number, a name
	Why         string    `json:"why"`
	Consequence string    `json:"consequence,omitempty"`
	Remedy      string    `json:"remedy,omitempty"`
	Since       time.Time `json:"since,omitzero"`
	Mendable    bool      `json:"mendable"` // by berth
	Mended      bool      `json:"mended"`
	Error       string    `json:"error,omitempty"` // why it was not
}

// Check is something about the node that was looked at.
type Check struct {
	Name   string `json:"name"` // "kernel version", "state_dir space"
	Level  Level  `json:"level"`
	Seen   string `json:"seen"`
	Want   string `json:"want,omitempty"`   // if that is not what was seen
	Remedy string `json:"remedy,omitempty"` // what an administrator can do about it
}

// Level is how bad it is.
type Level string

// The levels, from good to bad.
const (
	LevelOK      Level = "ok"
	LevelNote    Level = "note"    // something to know: a feature is not there
	LevelWarning Level = "warning" // it works, and will not always
	LevelError   Level = "error"   // berthd cannot start, or pods cannot
)

// Record is one line of the answer to long work.
type Record struct {
	// Ref is what the record is about, where several things are worked on.
	Ref string `json:"ref,omitempty"`
	// Stage says what is being done, such as "layers 3/8".
	Stage string `json:"stage,omitempty"`
	// Bytes of Total are done; a Total of 0 is not known.
	Bytes int64 `json:"bytes,omitempty"`
	Total int64 `json:"total,omitempty"`
	Rate  int64 `json:"rate,omitempty"` // bytes per second
	// Note says what became of the image: "imported", "present".
	Note string `json:"note,omitempty"`
	// Image is one that is complete now.
	Image *Image `json:"image,omitempty"`
	// Layer is one that has been verified, or repaired.
	Layer   *LayerReport `json:"layer,omitempty"`
	Summary *Summary     `json:"summary,omitempty"`
	Finding *Finding     `json:"finding,omitempty"`
	Op      *Op          `json:"op,omitempty"`
	Check   *Check       `json:"check,omitempty"`
	// Done marks the last record.
	Done bool `json:"done,omitempty"`
	// Error says why the work, or before the last record a part of it, failed.
	Error *Error `json:"error,omitempty"`
}
